"""TinyAutoencoder against diffusers' AutoencoderTiny, an independent TAEF2, and TAEF2's real weights.

`FM_JAX_WEIGHTS_DIR` names a folder with `taef2_encoder` and `taef2_decoder`, as `.safetensors` or, where PyTorch is
installed, as the published `.pth`.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from parity.harness import (
    Arrays,
    Case,
    assert_close,
    check_mutation,
    check_peer,
    check_record,
    first_last,
    random_input,
    to_torch,
)

import fm_jax.models.tiny_autoencoder as tiny_autoencoder
from fm_jax.data.images import load_images, to_float
from fm_jax.models.compute import Compute
from fm_jax.models.tiny_autoencoder import TinyAutoencoder, make_tiny_autoencoder
from fm_jax.weights.safetensors import open_tensors
from fm_jax.weights.tiny_autoencoder import Layout, tiny_autoencoder_config, tiny_autoencoder_rules

MODULES: dict[str, tuple[TinyAutoencoder, Layout]] = {
    "tiny_autoencoder": (TinyAutoencoder(16, (1, 2, 1), (2, 1, 1)), "diffusers"),
    "tiny_autoencoder_official": (TinyAutoencoder(12, (1, 1), (1, 1), latent_channels=6), "official"),
    "tiny_autoencoder_pooled": (TinyAutoencoder(16, (1, 2), (2, 1), latent_channels=6, pooled=True), "official"),
}


def inputs(module: TinyAutoencoder) -> Arrays:
    x = np.tanh(random_input("x", (2, 4 * module.factor, 6 * module.factor, 3)))
    return {"x": x, "z": 2 * random_input("z", (2, 4, 6, module.latent_channels))}


def ours(module: TinyAutoencoder, params: Any, inputs: Arrays) -> dict[str, Any]:
    z = module.apply({"params": params}, inputs["x"], method="encode")
    return {"z": z, "decoded": module.apply({"params": params}, inputs["z"], method="decode")}


def peer(module: TinyAutoencoder, layout: Layout, tensors: Arrays) -> Any:
    if layout == "diffusers":
        from diffusers import AutoencoderTiny

        config = tiny_autoencoder_config(module)
        assert config.pop("_class_name") == "AutoencoderTiny"
        model = AutoencoderTiny(**config)
    else:
        from parity.reference_tiny_autoencoder import Tiny

        blocks = (module.encoder_blocks, module.decoder_blocks)
        model = Tiny(module.channels, *blocks, module.latent_channels, module.pooled)
    model.load_state_dict(to_torch(tensors), strict=True)
    return model.eval()


def run_peer(model: Any, layout: Layout, inputs: Arrays) -> Arrays:
    """In float64: PyTorch's float32 differs from itself with another number of threads."""
    import torch

    model = model.double()
    with torch.no_grad():
        x, z = (torch.from_numpy(np.moveaxis(inputs[name], -1, 1).copy()).double() for name in ("x", "z"))
        if layout == "diffusers":
            outputs = {"z": model.encode(x).latents, "decoded": model.decode(z).sample}
        else:
            outputs = {"z": model.encoder((x + 1) / 2), "decoded": 2 * model.decoder(z) - 1}
    return {name: first_last(value.float()) for name, value in outputs.items()}


def paths(module: TinyAutoencoder, layout: Layout) -> tuple[tuple[str, str], ...]:
    """Layers in the order they are run, by the rules, which a mistake in the network does not change."""
    pairs = {}
    for piece in tiny_autoencoder_rules(module, layout).pieces:
        half, layer, *_ = piece.path.split("/")
        depth = 3 if layout == "diffusers" else 2
        pairs[f"{half}/{layer}"] = ".".join(piece.key.split(".")[:depth])
    return tuple(pairs.items())


def trace_ours(module: TinyAutoencoder, params: Any, inputs: Arrays) -> dict[str, Any]:
    outputs = {}
    for method, name in (("encode", "x"), ("decode", "z")):
        _, state = module.apply({"params": params}, inputs[name], method=method, capture_intermediates=True)
        for half in state["intermediates"].keys() & {"encoder", "decoder"}:
            layers = state["intermediates"][half]
            outputs |= {f"{half}/{key}": v["__call__"][0] for key, v in layers.items() if key != "__call__"}
    return outputs


def trace_theirs(module: TinyAutoencoder, layout: Layout, tensors: Arrays, inputs: Arrays) -> Arrays:
    model, outputs = peer(module, layout, tensors), {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out.clone()))
    run_peer(model, layout, inputs)
    return {name: first_last(outputs[name]) for _, name in paths(module, layout)}


def case(name: str) -> Case:
    module, layout = MODULES[name]
    return Case(
        name,
        cache(lambda: tiny_autoencoder_rules(module, layout)),
        lambda: inputs(module),
        lambda params, inputs: ours(module, params, inputs),
        lambda tensors, inputs: run_peer(peer(module, layout, tensors), layout, inputs),
        paths(module, layout),
        lambda params, inputs: trace_ours(module, params, inputs),
        lambda tensors, inputs: trace_theirs(module, layout, tensors, inputs),
    )


CASES = [case(name) for name in MODULES]
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.slow_but_one
@each
def test_equals_the_record(case: Case) -> None:
    check_record(case)


@pytest.mark.parity
@each
def test_equals_the_peer(case: Case) -> None:
    check_peer(case)


@pytest.mark.parity
@each
def test_blocks_have_the_peers_names(case: Case) -> None:
    ours = case.trace_ours(case.rules().to_ours(case.tensors()), case.inputs())
    theirs = case.trace_theirs(case.tensors(), case.inputs())
    assert {mine for mine, _ in case.blocks} <= set(ours)
    assert {other for _, other in case.blocks} <= set(theirs)


@pytest.mark.parametrize(("name", "value"), [("EPSILON", 1e-3), ("LARGEST", 4.0)], ids=["epsilon", "squashing"])
def test_sees_mistake(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_autoencoder, name, value)
    check_mutation(CASES[-1])


@pytest.mark.parity
def test_the_peer_opens_our_export(tmp_path: Path) -> None:
    import json

    safetensors = pytest.importorskip("safetensors.numpy")
    diffusers = pytest.importorskip("diffusers")
    case = CASES[0]
    (tmp_path / "config.json").write_text(json.dumps(tiny_autoencoder_config(MODULES[case.name][0])))
    params = case.rules().to_ours(case.tensors())
    safetensors.save_file(case.rules().to_theirs(params), tmp_path / "diffusion_pytorch_model.safetensors")
    model = diffusers.AutoencoderTiny.from_pretrained(tmp_path).eval()
    assert_close(case.outputs(), run_peer(model, "diffusers", case.inputs()))


TAEF2 = make_tiny_autoencoder("taef2")


@pytest.fixture(scope="module")
def taef2() -> Arrays:
    """The published tensors of both halves, float32, with `encoder.` and `decoder.` before the numbers."""
    folder = os.environ.get("FM_JAX_WEIGHTS_DIR")
    if not folder:
        pytest.skip("FM_JAX_WEIGHTS_DIR is not set: no published weights")
    tensors = {}
    for half in ("encoder", "decoder"):
        file = Path(folder) / f"taef2_{half}"
        if file.with_suffix(".safetensors").is_file():
            read = dict(open_tensors(file.with_suffix(".safetensors")))
        elif file.with_suffix(".pth").is_file():
            torch = pytest.importorskip("torch", reason=f"{file}.pth needs torch, or to be converted to safetensors")
            state = torch.load(file.with_suffix(".pth"), weights_only=True)
            read = {key: value.numpy() for key, value in state.items()}
        else:
            pytest.skip(f"{folder} has no {file.name}.safetensors or .pth")
        tensors |= {f"{half}.{key}": value.astype(np.float32) for key, value in read.items()}
    return tensors


@cache
def photographs(num: int) -> np.ndarray:
    try:
        return to_float(load_images("cifar10", f"test[:{num}]").images)
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"no CIFAR-10: {error}")


def psnr(x: np.ndarray, decoded: np.ndarray) -> float:
    """Mean over images, dB; the range of pixels is 2."""
    error = np.square((np.clip(decoded, -1, 1) - x) / 2, dtype=np.float64).mean(axis=(1, 2, 3))
    return float(-10 * np.log10(error).mean())


@pytest.mark.slow
def test_published_weights_restore_photographs(taef2: Arrays) -> None:
    params = tiny_autoencoder_rules(TAEF2, "official").to_ours(taef2)
    x = photographs(200)
    large = np.clip(jax.image.resize(x, (200, 64, 64, 3), "linear"), -1, 1)
    restore = jax.jit(lambda x: TAEF2.apply({"params": params}, x))
    assert psnr(x, restore(x)) >= 24.3
    assert psnr(large, np.concatenate([restore(each) for each in np.split(large, 4)])) >= 30.5


@pytest.mark.parity
def test_published_weights_equal_the_peer(taef2: Arrays) -> None:
    pytest.importorskip("torch")
    rules = tiny_autoencoder_rules(TAEF2, "official")
    assert rules.shapes == {key: value.shape for key, value in taef2.items()}
    x = np.asarray(np.tanh(jax.image.resize(random_input("x", (2, 8, 10, 3)), (2, 32, 40, 3), "cubic")))
    params = rules.to_ours(taef2)
    z = np.asarray(jax.jit(lambda x: TAEF2.apply({"params": params}, x, method="encode"))(x))
    found = jax.jit(lambda x, z: ours(TAEF2, params, {"x": x, "z": z}))(x, z)
    theirs = run_peer(peer(TAEF2, "official", taef2), "official", {"x": x, "z": z})
    assert_close({name: np.asarray(value) for name, value in found.items()}, theirs)


def test_bfloat16_is_near_float32() -> None:
    case, (module, _) = CASES[0], MODULES[CASES[0].name]
    params = case.rules().to_ours(case.tensors())
    half = module.clone(compute=Compute("bfloat16"))
    found, exact = jax.jit(lambda params, inputs: ours(half, params, inputs))(params, case.inputs()), case.recorded()
    for name, value in exact.items():
        assert np.linalg.norm(found[name] - value) <= 2e-2 * np.linalg.norm(value), name
