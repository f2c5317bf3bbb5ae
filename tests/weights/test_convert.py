"""Pickles as safetensors: what PyTorch holds to be safe, and nothing else; the average first."""

import argparse
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from weights import toy
from weights.test_formats import Bomb
from weights.toy import same_bits

from fm_jax.weights import convert as module
from fm_jax.weights.convert import convert, main
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.load import load
from fm_jax.weights.safetensors import open_tensors


class TestWithoutPyTorch:
    @pytest.mark.parametrize("version", ["2.9.1", "2.6.0+cu124", "1.13.1", "2.9.0a0+git123"])
    def test_an_old_one_is_refused(self, tmp_path, monkeypatch, version):
        fake = types.ModuleType("torch")
        fake.__version__ = version
        fake.load = lambda *arguments, **options: pytest.fail("it was asked to read")
        monkeypatch.setitem(sys.modules, "torch", fake)
        (tmp_path / "a.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "trap")))
        with pytest.raises(ImportError, match=rf"needs torch>=2\.10, got {version[:3]}.*CVE-2025-32434, CVE"):
            convert(tmp_path / "a.pt", tmp_path / "a.safetensors")
        with pytest.raises(SystemExit, match=r"needs torch>=2\.10"):
            main([str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")])
        assert [each.name for each in tmp_path.iterdir()] == ["a.pt"]

    def test_none_at_all(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=r"fm_jax.weights.convert needs torch: pip install"):
            convert(tmp_path / "a.pt", tmp_path / "a.safetensors")

    def test_newer_ones_are_taken(self, monkeypatch):
        for version in ("2.10.0", "2.13.0+cpu", "3.0.0"):
            fake = types.ModuleType("torch")
            fake.__version__ = version
            monkeypatch.setitem(sys.modules, "torch", fake)
            assert module._torch() is fake

    def test_importing_it_imports_no_torch(self):
        assert "torch" not in vars(module)


@pytest.mark.parity
class TestConvert:
    @pytest.fixture(autouse=True)
    def _torch(self, tmp_path):
        self.torch = pytest.importorskip("torch")
        self.source, self.target = tmp_path / "in.pt", tmp_path / "out.safetensors"

    def state(self, seed=0):
        return OrderedDict((key, self.torch.from_numpy(value)) for key, value in toy.tensors(seed=seed).items())

    def converted(self, content, key=None, **options):
        self.torch.save(content, self.source, **options)
        return convert(self.source, self.target, key=key)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_state_dict(self, zipped):
        (said,) = self.converted(self.state(), _use_new_zipfile_serialization=zipped)
        assert said.startswith("30 tensors with ")
        assert same_bits(load(self.target, toy.rules()), toy.params())
        assert open_tensors(self.target).metadata == {"format": "pt"}

    def test_the_average_of_a_training_of_dit(self):
        """With options of argparse, an optimiser, and an average."""
        checkpoint = {
            "model": self.state(),
            "ema": self.state(seed=1),
            "opt": {"state": {0: {"step": self.torch.ones(())}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(image_size=256, results_dir=None),
        }
        said = self.converted(checkpoint)
        assert f"'ema' is taken of {self.source}, and 'model', 'opt', 'args' left out." in said
        assert same_bits(load(self.target, toy.rules()), toy.params(seed=1))
        self.converted(checkpoint, key="model")
        assert same_bits(load(self.target, toy.rules()), toy.params())
        with pytest.raises(WeightsError, match=r"in\.pt has no 'other', it has 'model', 'ema', 'opt', 'args'"):
            self.converted(checkpoint, key="other")
        with pytest.raises(WeightsError, match=r"in\.pt\['opt'\] holds a dict under 'state', not a tensor; --key"):
            self.converted(checkpoint, key="opt")
        with pytest.raises(WeightsError, match=r"in\.pt\['args'\] holds a Namespace, not tensors by name"):
            self.converted(checkpoint, key="args")

    def test_nested(self):
        self.converted({"state_dict": self.state(), "epoch": 3})
        assert same_bits(load(self.target, toy.rules()), toy.params())
        self.converted({"a": {"model": self.state(), "model_ema": self.state(seed=1)}}, key="a.model_ema")
        assert same_bits(load(self.target, toy.rules()), toy.params(seed=1))
        # Latent diffusion's: the average is behind its own names in the same dict.
        flat = {f"model_ema.diffusion_model{key.replace('.', '')}": each for key, each in self.state(seed=1).items()}
        whole = {f"model.diffusion_model.{key}": each for key, each in self.state().items()} | flat
        self.converted({"state_dict": whole, "callbacks": {}})
        with pytest.warns(UserWarning, match="'model_ema' is taken, of 'model_ema' and 'model'"):
            assert same_bits(load(self.target, toy.rules()), toy.params(seed=1))

    def test_every_dtype_and_every_layout(self):
        torch = self.torch
        x = torch.arange(24.0).reshape(4, 6)
        shared = torch.zeros(10)
        content = {
            "transposed": x.T,
            "part": x[1:3, ::2],
            "parameter": torch.nn.Parameter(x.clone()),
            "tied": shared,
            "tied again": shared,
            "overlapping": shared[2:5],
            "scalar": torch.tensor(3.0, dtype=torch.float64),
            "none": torch.zeros(0, 3),
            "long": torch.tensor([2**40]),
            "bool": torch.tensor([True, False]),
            "bfloat16": x.to(torch.bfloat16).T,
            "half": x.half(),
            "float8": x.to(torch.float8_e4m3fn),
            "expanded": torch.ones(1).expand(4),
        }
        self.converted(content)
        found = open_tensors(self.target)
        assert found.keys() == content.keys()
        for key, value in content.items():
            assert found[key].shape == tuple(value.shape)
            np.testing.assert_array_equal(found[key].astype(np.float64), value.detach().to(torch.float64).numpy())
        assert found["bfloat16"].dtype == ml_dtypes.bfloat16
        assert found["float8"].dtype == ml_dtypes.float8_e4m3fn

    def test_what_runs_code_is_not_run(self):
        trap = self.source.with_name("trap")
        for content in (Bomb(trap), {"a": self.torch.zeros(2), "b": Bomb(trap)}, self.torch.nn.Linear(2, 2)):
            for zipped in (True, False):
                with pytest.raises(WeightsError, match="holds more than tensors and plain containers"):
                    self.converted(content, _use_new_zipfile_serialization=zipped)
        self.source.write_bytes(pickle.dumps(Bomb(trap)))
        with pytest.raises(WeightsError, match="Nothing of it was run"):
            convert(self.source, self.target)
        assert not trap.exists()
        assert not self.target.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda torch: {"a": torch.zeros(2), "step": 3}, "holds an int under 'step', not a tensor"),
            (lambda torch: {3: torch.zeros(2)}, "holds a Tensor under 3"),
            (lambda torch: {"x": {"a": torch.zeros(2)}}, "holds a dict under 'x', not a tensor; --key"),
            (lambda torch: [torch.zeros(2)], "holds a list, not tensors by name"),
            (lambda torch: torch.zeros(2), "holds a Tensor, not tensors by name"),
            (lambda torch: {}, "is empty"),
            (
                lambda torch: {"a": torch.zeros(2, dtype=torch.complex64)},
                "is torch.complex64; what is written",
            ),
            (lambda torch: {"a": torch.eye(2).to_sparse()}, "'a' of .* is torch.sparse_coo on cpu"),
            (lambda torch: {"a": torch.zeros(2, device="meta")}, "'a' of .* on meta"),
            (lambda torch: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "quantised"),
        ],
    )
    def test_what_is_not_written(self, content, message):
        with pytest.raises(WeightsError, match=message):
            self.converted(content(self.torch))
        assert not self.target.exists()

    def test_files(self, tmp_path):
        self.converted(self.state())
        with pytest.raises(WeightsError, match="is safetensors already"):
            convert(self.target, tmp_path / "b.safetensors")
        with pytest.raises(WeightsError, match=r"must end with \.safetensors"):
            convert(self.source, tmp_path / "b.bin")
        with pytest.raises(WeightsError, match="is not there"):
            convert(tmp_path / "absent.pt", self.target)
        self.source.write_bytes(b"GGUF")
        with pytest.raises(WeightsError, match="is quantised, in the format GGUF"):
            convert(self.source, self.target)
        self.source.write_bytes(b"\x80\x04\x95\0ctorch_utils.persistence\n_reconstruct_persistent_obj\n.")
        with pytest.raises(WeightsError, match=r"holds source code, as those of EDM and EDM2 do.*NVIDIA's own code"):
            convert(self.source, self.target)
        self.torch.save(self.state(), self.source)
        self.source.write_bytes(self.source.read_bytes()[:3000])
        with pytest.raises(WeightsError, match=r"in\.pt is not read.*damaged"):
            convert(self.source, self.target)

    def test_the_command(self, capsys):
        self.torch.save({"ema": self.state(), "model": self.state()}, self.source)
        main([str(self.source), str(self.target)])
        assert capsys.readouterr().out.splitlines() == [
            f"'ema' is taken of {self.source}, and 'model' left out.",
            f"30 tensors with 1,310 numbers are in {self.target}.",
        ]
        with pytest.raises(SystemExit, match="has no 'x'"):
            main([str(self.source), str(self.target), "--key", "x"])

    @pytest.mark.parametrize(("half", "count"), [("encoder", 1_338_528), ("decoder", 1_338_499)])
    def test_a_real_one(self, half, count):
        source = Path(__file__).parents[3] / "shared" / "weights" / f"taef2_{half}.pth"
        if not source.exists():
            pytest.skip("the weights of TAEF2 are not here")
        convert(source, self.target)
        found = open_tensors(self.target)
        assert sum(each.size for each in found.values()) == count
        assert {each.dtype for each in found.values()} == {np.dtype(np.float16)}
        theirs = self.torch.load(source, weights_only=True)
        assert theirs.keys() == found.keys()
        assert all((found[key] == value.numpy()).all() for key, value in theirs.items())
