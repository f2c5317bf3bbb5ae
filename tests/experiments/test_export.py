"""What a run is exported as: the same numbers as here, for programs that have not this library."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")
pytest.importorskip("safetensors", reason="needs the extra fm_jax[experiments]")
pytest.importorskip("flatbuffers", reason="needs the extra fm_jax[experiments]")

from safetensors.numpy import load_file

from experiments import digits, export, toy2d
from experiments.lab import export as lab
from experiments.lab import images
from experiments.lab.experiment import Experiment, read_run, restore_run
from experiments.lab.method import Method
from experiments.lab.samplers import SAMPLERS, make_sampler
from experiments.lab.sampling import Sampling, make_generate, named_sampler
from experiments.lab.training import from_json, restore
from fm_jax.latents import PIXELS, LatentSpace
from fm_jax.models import MLP, LabelEmbedding, init_params, linen_apply
from fm_jax.parameterization import bind
from fm_jax.samplers import Adaptive, DiffraxSDE
from fm_jax.schedules import Linear
from fm_jax.sources import Normal, Sampled

SEEDS = np.array([7, 3, 4_000_000_000], np.uint32)
LABELS = np.array([3, 0, 9], np.int32)
OF_DIFFRAX = [name for name in SAMPLERS if isinstance(make_sampler(name, Linear()), Adaptive | DiffraxSDE)]


def smoke(config, run_dir, **changes):
    """Its few steps are large, so that what it draws depends on labels and on the average."""
    training = dataclasses.replace(config.training, run_dir=run_dir, ema_decays=(0.3, 0.1), learning_rate=0.05)
    return dataclasses.replace(config, smoke=True, training=training, **changes)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("digits") / "run"
    images.run(smoke(digits.CONFIG, run, model="dit_tiny"))
    return run.with_name("run-smoke")


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("toy") / "run"
    toy2d.run(smoke(toy2d.CONFIG, run, source="moons"))
    return run.with_name("run-smoke")


@pytest.fixture(scope="module")
def written(digits_run, tmp_path_factory):
    """The three files of a run, as most tests look at them."""
    out = tmp_path_factory.mktemp("out") / "model.safetensors"
    export.run(export.Config(run=digits_run, out=out, solver="heun", steps=3, guidance=2.0, license="MIT"))
    return out


def call_of(out):
    return jax_export.deserialize(bytearray(out.with_suffix(".jax_export").read_bytes())).call


def noise(experiment, seeds):
    return jnp.concatenate([lab.draw_x0(experiment, jnp.uint32(seed))[0] for seed in seeds])


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 3])
def test_the_sampler_draws_what_the_library_draws_from_the_same_noise(num, written, digits_run):
    restored = restore_run(digits_run)
    sampling = dataclasses.replace(restored.config.sampling, solver="heun", steps=3, guidance=2.0)
    generate = make_generate(sampling, restored.config.method, restored.experiment.apply_fn, null_label=10)
    x0 = noise(restored.experiment, SEEDS[:num])
    expected = generate(restored.params, None, x0, LABELS[:num]).x
    found = call_of(written)(SEEDS[:num], LABELS[:num])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert jnp.abs(found - generate(restored.params, None, x0, (LABELS[:num] + 1) % 10).x).max() > 1e-3


def test_a_label_that_is_none_and_one_that_is_not_there(written):
    draw = call_of(written)
    assert jnp.isfinite(draw(SEEDS, np.full(3, 10, np.int32))).all()
    for label in (-1, 11):
        assert jnp.isnan(draw(SEEDS, np.full(3, label, np.int32))).all()


@pytest.mark.slow
def test_devices_share_a_batch_that_is_cut_over_them(written):
    num = jax.device_count()
    whole = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
    seeds, labels = np.arange(2 * num, dtype=np.uint32), np.arange(2 * num, dtype=np.int32) % 10
    found = jax.jit(call_of(written))(*jax.device_put((seeds, labels), whole))
    assert len(found.sharding.device_set) == num
    np.testing.assert_allclose(np.asarray(found), call_of(written)(seeds, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_program_of_jax_and_numpy_alone_draws(written, tmp_path):
    program = """
import sys
from pathlib import Path
import jax.export
import numpy as np

with open(sys.argv[1], "rb") as file:
    draw = jax.export.deserialize(bytearray(file.read())).call
x = draw(np.array([7, 3], np.uint32), np.array([3, 0], np.int32))
assert not {"fm_jax", "experiments", "flax", "diffrax", "equinox"} & {name.partition(".")[0] for name in sys.modules}
np.save(sys.argv[2], x)
"""
    files = [str(written.with_suffix(".jax_export")), str(tmp_path / "x.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(files[1]), call_of(written)(SEEDS[:2], LABELS[:2]), rtol=1e-4, atol=1e-4)


def test_the_parameters_are_read_without_this_library_and_are_the_same_bits(written, digits_run):
    restored = restore_run(digits_run)
    params = {}
    for name, leaf in load_file(written).items():
        *within, last = name.split(".")
        place = params
        for each in within:
            place = place.setdefault(each, {})
        place[last] = leaf
    assert jax.tree.structure(params) == jax.tree.structure(restored.params)
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)
    jax.tree.map(np.testing.assert_array_equal, lab.nested(load_file(written)), restored.params)
    x = jax.random.normal(jax.random.key(0), (2, *restored.experiment.event_shape))
    field = jax.jit(lambda params: bind(restored.experiment.apply_fn, params)(jnp.float32(0.3), x, LABELS[:2]))
    np.testing.assert_array_equal(field(params), field(restored.params))


def metadata(path):
    """As the format says: eight bytes of a length, then JSON."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_the_file_says_what_it_is(written, digits_run, tmp_path):
    told = metadata(written)
    assert all(isinstance(value, str) for value in told.values())
    assert (told["format_version"], told["step"], told["average"], told["license"]) == ("1", "4", "0.3", "MIT")
    config, experiment = read_run(digits_run)
    record = json.loads(told["config"])
    assert record.pop("experiment") == "images"
    again = from_json(images.Config, record)
    training = dataclasses.replace(again.training, run_dir=digits_run)
    assert dataclasses.replace(again, training=training) == config
    for name, file in (("config", "config.json"), ("data", "data.json")):
        (tmp_path / file).write_text(told[name])
    assert read_run(tmp_path)[1].model == experiment.model
    assert json.loads(told["sampler"])["solver"] == "heun"
    assert json.loads(told["data"])["source"] == "digits"
    assert os.stat(written).st_mode == os.stat(written.with_suffix(".md")).st_mode


def test_no_file_says_where_it_was_made(written, digits_run):
    places = [str(digits_run.parent), str(written.parent), os.path.dirname(lab.__file__), os.path.dirname(jax.__file__)]
    for ending in (".safetensors", ".jax_export", ".md"):
        content = written.with_suffix(ending).read_bytes()
        assert [place for place in places if place.encode() in content] == [], ending


def test_the_card(written):
    yaml = pytest.importorskip("yaml")
    _, front, text = written.with_suffix(".md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front == {"license": "mit", "library_name": "fm_jax", "tags": ["flow-matching", "jax", "class-conditional"]}
    for line in (
        "| source | digits |",
        "| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "| licence | not stated |",
        "| steps | 4 of 4 |",
        "| average of the parameters | 0.3 |",
        "| unguided, nfe | 2 |",
        "| solver | heun |",
        "| guidance | 2 |",
        "| platforms | cpu cuda tpu |",
        "| model | MIT |",
        "| data | not stated |",
        "x = draw(seeds, labels)  # float32 [16, 8, 8, 1]",
    ):
        assert line in text.splitlines(), line


@pytest.mark.slow
def test_the_code_of_the_card_runs(written, toy_run, tmp_path, monkeypatch):
    export.run(export.Config(run=toy_run, out=tmp_path / "toy.safetensors", weights="beside"))
    for card, shape in ((written.with_suffix(".md"), (16, 8, 8, 1)), (tmp_path / "toy.md", (16, 2))):
        monkeypatch.chdir(card.parent)
        names = {}
        for block in card.read_text().split("```python\n")[1:]:
            exec(block.partition("```")[0], names)
        assert names["x"].shape == shape
        assert "embed" in names["params"] or shape == (16, 2)


@pytest.mark.parametrize(
    ("license", "front"),
    [
        (None, {}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("ours: 'all' of \"it\" # yes", {"license": "other", "license_name": "ours: 'all' of \"it\" # yes"}),
        ("Lizenz für alle", {"license": "other", "license_name": "Lizenz für alle"}),
    ],
)
def test_a_licence_is_told_as_it_is_given(license, front):
    yaml = pytest.importorskip("yaml")
    card = lab.Card("m", {}, {}, {}, {"platforms": ["cpu"], "jax": "1"}, 4, "none", (2,), None, 3, True, license, None)
    text = lab.write_card(card)
    assert {"library_name", "tags"} | front.keys() == (found := yaml.safe_load(text.split("---\n")[1])).keys()
    assert {name: found[name] for name in front} == front
    assert "trained with fm_jax on: not stated." in text
    assert "## Results\n\nNot stated." in text
    assert text.count("not stated") > 10


def draw_of(solver, num_classes=None, source=None, space=PIXELS, method=None, **options):
    """The sampler of a small network that was never trained, as it is here, and exported to any batch."""
    module = MLP(features=(8,), embed=None if num_classes is None else LabelEmbedding(num_classes))
    rng = np.random.default_rng(0)
    initial = init_params(module, jax.random.key(0), (2,))
    params = jax.tree.map(lambda leaf: np.float32(0.3) * rng.standard_normal(leaf.shape, dtype=np.float32), initial)
    experiment = Experiment(module, linen_apply(module), source or Normal(), (2,), num_classes, space=space)
    sampling = Sampling(solver, **({"steps": 3, "guidance": 1.0} | options))
    generate = make_generate(sampling, method or Method(), experiment.apply_fn, null_label=num_classes)
    draw = lab.make_draw(generate, experiment)
    exported = lab.export_draw(draw, params, labelled=num_classes is not None, platforms=("cpu", "cuda"), inside=True)
    here = jax.jit(lambda *arguments: draw(params, *arguments))
    return here, jax_export.deserialize(exported.serialize()).call


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(name, marks=() if name in ("heun", "ddpm") else pytest.mark.slow)
        for name in SAMPLERS
        if name not in OF_DIFFRAX
    ],
)
def test_a_sample_is_a_function_of_its_own_seed_and_label_by_every_sampler(solver):
    here, draw = draw_of(solver, 10, guidance=2.0, method=Method(path="vp", prediction="noise"))
    found = draw(SEEDS, LABELS)
    np.testing.assert_allclose(found, here(SEEDS, LABELS), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(draw(SEEDS[1:], LABELS[1:]), found[1:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(draw(SEEDS[::-1], LABELS[::-1])[::-1], found, rtol=1e-4, atol=1e-4)
    assert np.abs(np.diff(draw(SEEDS, 0 * LABELS), axis=0)).max(axis=1).min() > 1e-2  # seeds count,
    assert np.abs(draw(SEEDS, (LABELS + 1) % 10) - found).max(axis=1).min() > 1e-3  # and labels


@pytest.mark.parametrize("solver", OF_DIFFRAX)
def test_what_would_call_python_is_refused(solver):
    sampler = named_sampler(Sampling(solver), Method())
    with pytest.raises(ValueError, match=r"calls Python where a solve fails, .* fixed steps .* such as heun, ab2,"):
        lab.check_exportable(sampler, solver)


@pytest.mark.slow
def test_what_calls_python_is_refused_however_it_comes_there():
    with pytest.raises(ValueError, match="calls Python where a solve fails"):
        draw_of("tsit5")


def test_every_other_sampler_is_let_pass():
    for solver in SAMPLERS.keys() - OF_DIFFRAX:
        lab.check_exportable(named_sampler(Sampling(solver), Method()), solver)


@pytest.mark.slow
def test_an_adaptive_sampler_that_fails_gives_nan(tmp_path):
    """As the message says and the page: with EQX_ON_ERROR=nan, which Equinox reads when it is imported."""
    program = f"""
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("test_export", {__file__!r})
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
test.lab.check_exportable(test.Adaptive(), "tsit5")
for name in ("tsit5", "kvaerno3", "shark", "adaptive_shark"):
    here, draw = test.draw_of(name, tolerance=1e-3)
    np.testing.assert_allclose(draw(test.SEEDS), here(test.SEEDS), rtol=1e-3, atol=1e-3)
    assert np.isfinite(draw(test.SEEDS)).all(), name
_, exact = test.draw_of("rk4", steps=50)
_, draw = test.draw_of("tsit5", tolerance=1e-5)
np.testing.assert_allclose(draw(test.SEEDS), exact(test.SEEDS), rtol=1e-3, atol=1e-3)
test.SAMPLERS["tsit5"] = test.Adaptive("tsit5", max_steps=2)
_, draw = test.draw_of("tsit5", tolerance=1e-6)
assert np.isnan(draw(test.SEEDS)).all()
"""
    environment = os.environ | {"EQX_ON_ERROR": "nan", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_classes_seeds_are_all_that_is_asked_for(toy_run, tmp_path, capsys):
    export.run(export.Config(run=toy_run, out=tmp_path / "new" / "toy.safetensors", average="none", license="mine"))
    draw = call_of(tmp_path / "new" / "toy.safetensors")
    assert draw(SEEDS).shape == (3, 2)
    with pytest.raises(ValueError, match=r"structure as when the function 'draw' was exported"):
        draw(SEEDS, LABELS)
    assert "toy.jax_export: euler for cpu, cuda, tpu, any batch" in capsys.readouterr().out
    card = (tmp_path / "new" / "toy.md").read_text()
    assert "trained with fm_jax on: eight_gaussians" in card
    assert "x = draw(seeds)" in card
    assert "labels" not in card


@pytest.mark.slow
def test_another_source_and_another_scale_are_in_the_sampler():
    def line(key, num):
        return jnp.stack([jax.random.uniform(key, (num,)), jnp.zeros(num)], axis=1) + 3

    _, plain = draw_of("euler", source=Sampled(line))
    _, scaled = draw_of("euler", source=Sampled(line), space=LatentSpace(shift=-2.0, scale=0.5))
    np.testing.assert_allclose(scaled(SEEDS), np.asarray(plain(SEEDS)) * 2.0 - 2.0, rtol=1e-5)
    _, normal = draw_of("euler")
    assert jnp.abs(normal(SEEDS) - plain(SEEDS)).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("average", "name"), [("none", None), ("0.3", "0.3"), ("0.10", "0.1"), (None, "0.3")])
def test_the_average_that_is_asked_for(average, name, toy_run, digits_run, tmp_path):
    run = digits_run if average == "0.10" else toy_run
    export.run(export.Config(run=run, out=tmp_path / "a.safetensors", average=average, weights="beside", solver="heun"))
    restored = restore_run(run)
    state = restore(restored.config, restored.params)
    wanted = state.params if name is None else state.ema[name]
    jax.tree.map(np.testing.assert_array_equal, lab.nested(load_file(tmp_path / "a.safetensors")), wanted)
    assert metadata(tmp_path / "a.safetensors")["average"] == (name or "none")
    leaves = [jax.tree.leaves(each)[0] for each in (state.params, *state.ema.values())]
    assert min(jnp.abs(a - b).max() for a, b in itertools.combinations(leaves, 2)) > 1e-4


@pytest.mark.slow
def test_parameters_beside_the_sampler(digits_run, written, tmp_path):
    out = tmp_path / "b.safetensors"
    export.run(export.Config(run=digits_run, out=out, solver="heun", steps=3, guidance=2.0, weights="beside"))
    found = call_of(out)(load_file(out), SEEDS, LABELS)
    np.testing.assert_allclose(found, call_of(written)(SEEDS, LABELS), rtol=1e-4, atol=1e-4)
    zeros = {name: np.zeros_like(leaf) for name, leaf in load_file(out).items()}
    assert jnp.abs(call_of(out)(zeros, SEEDS, LABELS) - found).max() > 1e-3
    assert out.with_suffix(".jax_export").stat().st_size < written.with_suffix(".jax_export").stat().st_size


@pytest.mark.slow
def test_options_of_guidance_are_in_the_sampler(digits_run, written, tmp_path):
    found = [call_of(written)(SEEDS, LABELS)]
    for options in ({"guidance": 1.0}, {"avoid": 5}, {"also": 8}, {"weak_run": digits_run, "guidance": 3.0}):
        out = tmp_path / f"{next(iter(options))}.safetensors"
        export.run(export.Config(**({"run": digits_run, "out": out, "solver": "heun", "steps": 3} | options)))
        found.append(call_of(out)(SEEDS, LABELS))
    np.testing.assert_allclose(found[1], found[4], atol=1e-4)  # away from a network by itself leads nowhere
    for other in (found[0], found[2], found[3]):
        assert jnp.abs(other - found[1]).max() > 1e-4
    assert "| avoid | 5 |" in (tmp_path / "avoid.md").read_text()
    assert "guidance" not in metadata(tmp_path / "guidance.safetensors")["sampler"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["export_draw", "write_card", "flat"])
def test_files_that_are_there_stay_until_all_is_well(where, toy_run, tmp_path, monkeypatch):
    out = tmp_path / "model.safetensors"
    export.run(export.Config(run=toy_run, out=out))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"model.safetensors", "model.jax_export", "model.md"}
    monkeypatch.setattr(export, where, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.run(export.Config(run=toy_run, out=out, average="none"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_of_several_processes_writes(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    export.run(export.Config(run=toy_run, out=tmp_path / "model.safetensors"))
    assert list(tmp_path.iterdir()) == []


WRONG = [
    ({"out": "model.npz"}, r"--out must end in .safetensors, got model.npz"),
    ({"out": "model"}, r"--out must end in .safetensors, got model"),
    ({"average": "fast"}, "--average must be a decay, such as 0.999, or none, got fast"),
    ({"average": "0.7"}, "--average must be one that the run has, of 0.3, 0.1, none, got 0.7"),
    ({"platforms": ()}, "--platforms must have at least one value"),
    ({"platforms": ("gpu",)}, "each of --platforms must be one of 'cpu', 'cuda', 'tpu', 'rocm', got 'gpu'"),
    ({"platforms": ("cpu", "cpu")}, "--platforms must be distinct"),
    ({"weights": "apart"}, "--weights must be one of 'inside', 'beside', got 'apart'"),
    ({"license": "MIT\nand more"}, r"--license must be one line of text, got 'MIT\\nand more'"),
    ({"data_license": " "}, "--data-license must be one line of text, got ' '"),
    ({"solver": "tsit5"}, "--solver tsit5 calls Python where a solve fails"),
    ({"solver": "kvaerno3"}, "--solver kvaerno3 calls Python where a solve fails"),
    ({"solver": "nope"}, "--solver must be one of 'euler'"),
    ({"solver": "ddim"}, "--source moons needs --prediction velocity and a solver such as heun"),
    ({"avoid": 3}, "--avoid needs a run with classes"),
    ({"out": "folder.safetensors"}, "folder.safetensors is a folder, and must be a file"),
    ({"out": "sampler.safetensors"}, "sampler.jax_export is a folder, and must be a file"),
    ({"out": "README.safetensors"}, "README.md is no model card of an export, and would be replaced: give another"),
    ({"out": "README.safetensors/a.safetensors"}, "cannot be"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_and_nothing_is_written(options, message, toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "sampler.jax_export").mkdir()
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "README.safetensors").write_text("mine")
    before = sorted((path.name, path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    changed = {name: Path(value) if name == "out" else value for name, value in options.items()}
    with pytest.raises((ValueError, OSError, SystemExit), match=message):
        export.run(export.Config(**({"run": toy_run} | changed)))
    assert sorted((path.name, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--solver heun --tolerance 0.1", "--tolerance 0.1 would have no effect: --solver heun has fixed steps"),
        ("--guidance 3", "--guidance 3.0 would have no effect: the run has no classes"),
        ("--platforms gpu", "invalid choice 'gpu' for argument '--platforms'"),
        ("--license ''", "--license must not be empty"),
    ],
)
def test_command_line(options, message, toy_run, tmp_path, monkeypatch, capsys):
    import shlex

    monkeypatch.setattr(sys, "argv", ["export", "--run", str(toy_run), *shlex.split(options)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        export.main()
    told = " ".join((capsys.readouterr().err + str(caught.value.code)).replace("│", " ").split())
    assert message in told, told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["safetensors.numpy", "flatbuffers"])
def test_a_missing_package_is_named(package, toy_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'fm_jax\[experiments\]'"):
        export.run(export.Config(run=toy_run, out=tmp_path / "model.safetensors"))


def test_parameters_that_are_too_many_go_beside(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"--weights must be beside for 0.0 GB of parameters"):
        export.run(export.Config(run=toy_run, out=tmp_path / "model.safetensors"))
    export.run(export.Config(run=toy_run, out=tmp_path / "model.safetensors", weights="beside"))


PAGE = Path(__file__).parents[2] / "docs" / "howto" / "export.md"


@pytest.mark.slow
def test_the_page_runs_and_says_what_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert "0.999 True" in capsys.readouterr().out
    assert names["draw"](SEEDS, LABELS).shape == (3, 2)
    assert names["gap"] < 1e-4
    assert "callback" in names["refused"]
    of_diffrax = set(re.findall(r"\w+", PAGE.read_text().split("The solvers of Diffrax")[1].split("call Python")[0]))
    assert {name for name in OF_DIFFRAX if not name.startswith("adaptive_")} <= of_diffrax
