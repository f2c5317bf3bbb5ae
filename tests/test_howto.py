"""The how-to pages: their code runs and says what the page says, their links lead somewhere, their options exist."""

import contextlib
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.losses import flow_matching
from fm_jax.paths import AffinePath
from fm_jax.schedules import Linear

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "howto").glob("*.md"))}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """These programs run for a moment and are slow to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the code of a page from top to bottom, in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run_page(page: str) -> dict:
        names: dict = {"__name__": page}
        for i, block in enumerate(blocks(page, "python")):
            exec(compile(block, f"{page}.md, block {i}", "exec"), names)
        return names

    return run_page


@pytest.mark.slow
def test_own_images(run, tmp_path):
    pytest.importorskip("grain", reason="needs the extra fm_jax[data]")
    pytest.importorskip("PIL.Image", reason="needs the extra fm_jax[data]")
    names = run("own_images")
    # 64 samples of two classes; that the labels were not heeded would show in half of them.
    assert ((names["right"] > names["below"]) == names["wanted"]).mean() > 0.9
    assert names["dataset"].images.shape == (360, 8, 8, 1)
    assert names["squares"].class_names == ("blue", "red")


@pytest.mark.slow
def test_own_project(run):
    names = run("own_project")
    # The least loss is pi / 2; over 20,000 examples its standard error is 0.015.
    assert np.pi / 2 - 0.06 < names["final"] < np.pi / 2 + 0.15
    np.testing.assert_allclose(names["x1"].mean(axis=0), [1, -1], atol=0.25)
    np.testing.assert_allclose(names["x1"].std(axis=0), 1, atol=0.25)
    for name in ("noise_loss", "often_in_the_middle", "by_transport", "for_guidance"):
        loss, _ = jax.eval_shape(names[name], names["params"], jax.random.key(0), names["draw"](jax.random.key(1), 8))
        assert loss.shape == ()

    # Both fields are untrained; the loss of one that is 0 is 1 + 1 + 1, of the mean, the data and the source.
    for name, (params, apply_fn) in names["adapted"].items():
        loss, _ = jax.jit(flow_matching(apply_fn, AffinePath()))(
            params, jax.random.key(0), names["draw"](jax.random.key(1), 256)
        )
        assert 2 < loss < 6, name


@pytest.mark.slow
def test_text(run):
    names = run("text")
    assert np.isfinite(names["loss"])
    assert names["pictures"].shape == names["filled"].shape == (2, 8, 8, 1)
    assert np.abs(names["filled"][:, :, :4]).max() < 1e-5
    assert np.abs(names["filled"][:, :, 4:]).max() > 0.1


@pytest.mark.slow
def test_control(run):
    names = run("control")
    assert (names["before"] == names["after"]).all()
    labels = {jax.tree_util.keystr(path): name for path, name in jax.tree_util.tree_leaves_with_path(names["labels"])}
    assert {path for path, name in labels.items() if name == "new"} == {path for path in labels if "branch_" in path}
    updates = jax.tree_util.tree_leaves_with_path(names["updates"])
    assert not any(leaf.any() for path, leaf in updates if "branch_" not in jax.tree_util.keystr(path))
    v = names["v"]
    assert v.nfe == 3
    assert v(0.5, names["x"]).shape == (4, 8, 8, 1)


def test_latents(run):
    pytest.importorskip("grain", reason="needs the extra fm_jax[data]")
    pytest.importorskip("array_record", reason="needs the extra fm_jax[data]")
    names = run("latents")
    assert names["latents"].shape == (4, 4, 4)
    assert 0.9 < names["batch"]["x1"].std() < 1.1
    assert names["batch"]["cond"].shape == (128,)


@pytest.mark.slow
def test_guidance(run):
    names = run("guidance")
    (plain, nfe), (guided, guided_nfe) = names["plain"], names["guided"]
    # Of the data 93.8% are nearest to their own mean, of 1,500 samples with a standard error of 0.6%.
    assert 0.9 < plain < 0.975
    assert guided > 0.985
    assert (nfe, guided_nfe) == (20, 40)
    assert names["error"] < 1e-4


def test_choose_sampler(run):
    names = run("choose_sampler")
    errors = names["errors"]
    assert max(errors["midpoint"], errors["Adams-Bashforth 2"]) < 0.3 * errors["Euler"]
    assert names["solution"].nfe == 10
    np.testing.assert_allclose(names["by_edm"].std(axis=0), names["accurate"].x.std(axis=0), atol=0.25)
    np.testing.assert_allclose(names["x"][:, 0], 0.5, atol=1e-6)
    assert names["gap"] < 0.02
    np.testing.assert_allclose(names["latent"], names["x0"], atol=2e-3)
    np.testing.assert_allclose(names["noisy"].std(axis=0), names["accurate"].x.std(axis=0), atol=0.25)


@pytest.mark.slow
def test_devices(run):
    names = run("devices")
    assert all(jax.tree.leaves(names["same"]))
    assert len(names["devices"]) == jax.local_device_count()
    assert names["gap"] < 1e-4


@pytest.mark.slow
def test_checkpoints(run):
    names = run("checkpoints")
    assert all(jax.tree.leaves(names["same"]))
    assert int(names["resumed"].step) == 60
    assert int(names["tuned"].step) == 0
    jax.tree.map(np.testing.assert_array_equal, names["tuned"].params, names["resumed"].ema["0.8"])
    assert [row["step"] for row in names["rows"]] == [10, 20, 30, 40, 50, 60]


@pytest.mark.slow
def test_likelihood(run):
    names = run("likelihood")
    assert jnp.abs(names["nats"] - names["exact"]).max() < 1e-2
    error = np.asarray(names["error"])
    assert 0.1 < error.std() < 10
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(error))
    assert abs(names["bound"].mean() - names["bits"]) < 0.02


@pytest.mark.slow
def test_between_two_datasets(run):
    names = run("between_two_datasets")
    assert names["paired_error"] < 0.15
    # Of the eight Gaussians: E sqrt(25 + 10 z + z^2 + z'^2) = 5.10 up to the fourth order in 1 / 5.
    assert abs(names["radius"] - 5.1) < 0.4
    assert abs(jnp.sqrt((names["there"] ** 2).sum(axis=1)).mean() - 5.1) < 0.5
    for name in ("from_moons", "from_box"):
        assert abs(jnp.sqrt((names[name] ** 2).sum(axis=1)).mean() - 5.1) < 0.5
    # On what is inside of the box, log p = -2 log 12 less the change of volume; of the data, -E log p is 4.9 nats.
    nats = names["nats"]
    assert jnp.isfinite(nats).mean() > 0.95
    assert 3 < -nats[jnp.isfinite(nats)].mean() < 5.5
    np.testing.assert_allclose(names["back"].mean(axis=0), [0, 0.5], atol=0.4)
    for k, place in ((10, [2, 2]), (20, [4, 0])):
        np.testing.assert_allclose(names["way"][k].mean(axis=0), place, atol=0.25)


@pytest.mark.slow
def test_few_steps(run):
    names = run("few_steps")
    errors, bends = names["errors"], names["bends"]
    assert errors["distilled"] < errors["reflowed"] < 0.4 * errors["flow"]
    assert bends["reflowed"] < 0.1 * bends["flow"]
    assert names["learned"] < names["four_steps"]


def library_tests(path: str):
    """A module of the library's own tests, to be applied to what a page defines."""
    spec = importlib.util.spec_from_file_location(f"howto_{Path(path).stem}", ROOT / "tests" / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_extend(run, monkeypatch):
    names = run("extend")
    ratios = np.divide(names["errors"][:-1], names["errors"][1:])
    assert (ratios > 3.3).all()
    assert (ratios < 5).all()

    every_schedule = library_tests("test_schedules.py").TestEverySchedule()
    with jax.enable_x64(True):
        every_schedule.test_derivatives_equal_central_differences(names["schedule"], None)
        inverse, finite, increasing = library_tests("test_contracts.py").claims_of(names["schedule"])
    assert inverse < 1e-12
    assert finite
    assert increasing

    # Of 20,000 draws in three dimensions, each with variance 1.
    assert abs(names["entropy"] - 3 * (1 + np.log(2))) < 5 * np.sqrt(3 / 20_000)
    plain, antithetic = names["values"]["flow_matching"], names["values"]["antithetic_matching"]
    assert abs(plain.mean() - antithetic.mean()) < 5 * (plain.std() + antithetic.std()) / np.sqrt(2000)
    assert antithetic.std() < 0.8 * plain.std()

    contract = library_tests("couplings/test_couplings_contract.py")
    for labelled in (False, True):
        contract.test_a_permutation_that_leaves_data_in_place(names["by_rank"], labelled)

    models = library_tests("models/test_models_contract.py")
    monkeypatch.setitem(models.MODELS, "gated", names["Gated"])
    models.TestContract().test_starts_at_zero_in_float32("gated")
    models.TestContract().test_depends_on_time_label_and_state_of_its_own_example_only("gated")

    check_marginals(names["Swirl"]())


def check_marginals(path):
    """E[phi(x_t) u_t] = E[phi(x_t) v(t, x_t)] for phi = tanh and phi = 1, within five standard errors of 20,000 draws.

    Turning with the path, the marginals are those of straight lines: v(t, x) = R v_line(t, R^-1 x) + a'(t) J x.
    """
    t, rng = 0.3, np.random.default_rng(0)
    means = np.array([[-1.5, 0.5], [1.0, 1.0]], np.float32)
    x0, noise = rng.standard_normal((2, 20_000, 2), dtype=np.float32)
    x1 = means[rng.integers(2, size=20_000)] + 0.5 * noise
    angle, slope = path.angle * t * (1 - t), path.angle * (1 - 2 * t)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)  # of rows
    straight = oracles.velocity(oracles.gaussian_mixture(means, 0.5), Linear())
    x_t, u_t = map(np.asarray, jax.jit(lambda x0, x1: path.sample(None, jnp.asarray(t), x0, x1)[1:3])(x0, x1))
    v = np.asarray(jax.jit(straight)(t, x_t @ turn.T)) @ turn + slope * np.stack([-x_t[:, 1], x_t[:, 0]], axis=1)
    for phi in (np.ones_like(v), np.tanh(x_t)):
        gap = phi * (u_t - v)
        error = gap.std(axis=0) / np.sqrt(len(gap))
        assert (np.abs(gap.mean(axis=0)) < 5 * error).all()
        assert (error < 0.02).all()  # of velocities of size 1


@pytest.mark.slow
def test_weights(run):
    names = run("weights")
    assert all(jax.tree.leaves(names["same"]))
    assert names["out"].shape == (2, 16, 16, 8)
    jax.tree.map(np.testing.assert_array_equal, names["again"], names["params"])
    assert "final_layer.linear.bias" in names["refused"]
    assert "module.extra" in names["refused"]


@pytest.mark.slow
def test_pretrained(run):
    names = run("pretrained")
    assert names["drawn"].images.shape == names["by_unipc"].images.shape == (2, 16, 16, 3)
    assert names["drawn"].nfe == 8
    assert names["again"].trajectory.shape == (5, 2, 8, 8, 4)
    np.testing.assert_array_equal(names["again"].trajectory[0], names["noise"])


@pytest.mark.slow
def test_from_diffusers(run, tmp_path):
    import flax.serialization

    names = run("from_diffusers")
    image, matrix = np.arange(24.0).reshape(1, 2, 3, 4), np.arange(6.0).reshape(2, 3)
    tree = {
        "down_blocks_0": {"resnets_1": {"conv1": {"kernel": image}, "norm1": {"scale": matrix[0]}}},
        "time_embedding": {"linear_1": {"kernel": matrix}},
        "block": {"0": {"DenseReluDense": {"wi_0": {"kernel": matrix}}}},
        "attn1": {"to_out_0": {"bias": matrix[0]}},
        "shared": {"embedding": matrix},
    }
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    tensors = names["from_flax"](tmp_path / "flax_model.msgpack")
    assert tensors.keys() == {
        "down_blocks.0.resnets.1.conv1.weight",
        "down_blocks.0.resnets.1.norm1.weight",
        "time_embedding.linear_1.weight",
        "block.0.DenseReluDense.wi_0.weight",
        "attn1.to_out.0.bias",
        "shared.weight",
    }
    np.testing.assert_array_equal(tensors["down_blocks.0.resnets.1.conv1.weight"], image.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(tensors["time_embedding.linear_1.weight"], matrix.T)
    np.testing.assert_array_equal(tensors["shared.weight"], matrix)
    assert names["draw"](lambda t, x, cond: 0.1 * x, jnp.ones((2, 4, 4, 4)), None, 5).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("page", PAGES)
def test_form(page):
    text = PAGES[page].read_text()
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)) == 1
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (PAGES[page].parent / target).exists(), target


def test_the_index_has_every_page():
    listed = re.findall(r"^\| \[(\w+)\.md\]\(\1\.md\)", PAGES["README"].read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(PAGES.keys() - {"README"})


def commands() -> list[tuple[str, str]]:
    """Every `python -m module ...` of the pages, in a shell block or in the text."""
    found = []
    for page, path in PAGES.items():
        shell = " ".join(blocks(page, "sh")).replace("\\\n", " ")
        for text in (*shell.splitlines(), *re.findall(r"`(python -m [^`]*)`", path.read_text())):
            found += [(page, command) for command in re.findall(r"python -m [^;&|`]*", text)]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_options_exist(page, command, monkeypatch):
    """Each command line is read by the parser of its module, which refuses what it does not know."""
    pytest.importorskip("tyro", reason="needs the extra fm_jax[experiments]")
    _, _, name, *options = shlex.split(command)
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *options])
    if name == "fm_jax.data.images":
        monkeypatch.setattr(module, "prepare", lambda *_, **__: None)
        module.main()
        return
    if name == "fm_jax.weights.convert":
        monkeypatch.setattr(module, "convert", lambda *_, **__: "")
        module.main()
        return
    parse = importlib.import_module("experiments.lab.command_line").parse
    default = getattr(module, "CONFIG", None)
    with contextlib.redirect_stderr(sys.stdout):
        parse(module.Config if default is None else type(default), default)
