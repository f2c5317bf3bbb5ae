"""WanAutoencoder, which takes a clip at once, against diffusers' AutoencoderKLWan, which takes it piece by piece."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import (
    Arrays,
    Case,
    check_mutation,
    check_peer,
    check_record,
    distances,
    first_difference,
    first_last,
    random_input,
    to_torch,
)

from fm_jax.latents import LatentSpace
from fm_jax.models import Compute, causal
from fm_jax.models.wan_autoencoder import WanAutoencoder
from fm_jax.weights.folder import open_model, save_model
from fm_jax.weights.wan_autoencoder import wan_autoencoder_config, wan_autoencoder_rules

SPACE = LatentSpace((0.1, -0.2, 0.3), (0.5, 2.0, 1.25))
SMALL: dict[str, Any] = {"channels": (8, 16), "num_blocks": 1, "latent_channels": 3}
MODULES = {
    # As published, but for widths: sides twice halved before frames are, then both.
    "wan_autoencoder": WanAutoencoder((8, 8, 16, 16), 1, 3, 1, halve_frames=(False, True, True), latents=SPACE),
    # The first level is halved in time; two blocks; a larger picture.
    "wan_autoencoder_colour": WanAutoencoder((8, 16), 2, 4, halve_frames=(True,)),
    # Wan 2.2: averages and copies around the levels, squares of pixels, another decoder.
    "wan_autoencoder_residual": WanAutoencoder(
        (8, 16, 16), 1, 3, 2, halve_frames=(True, True), decoder_channels=(12, 24, 24), residual=True, patch_size=2
    ),
}
FRAMES = {"wan_autoencoder": (1, 5, 9), "wan_autoencoder_colour": (5,), "wan_autoencoder_residual": (1, 9)}


def inputs(name: str) -> Arrays:
    module = MODULES[name]
    rows, columns = (3, 4) if module.factor == 2 else (1, 2)
    height, width = rows * module.factor, columns * module.factor
    arrays = {}
    for frames in FRAMES[name]:
        latent = 1 + (frames - 1) // module.time_factor
        arrays[f"x{frames}"] = np.tanh(random_input("x", (2, frames, height, width, module.image_channels)))
        arrays[f"z{frames}"] = random_input("z", (2, latent, rows, columns, module.latent_channels))
    return arrays


def ours(module: WanAutoencoder, params: Any, inputs: Arrays) -> dict[str, Any]:
    outputs = {}
    for name, value in inputs.items():
        frames = name[1:]
        if name[0] == "z":
            outputs[f"decoded{frames}"] = module.apply({"params": params}, value, method="decode")
            continue
        moments = module.apply({"params": params}, value, method="encode")
        outputs |= {f"mean{frames}": moments.mean, f"log_variance{frames}": moments.log_variance}
    return outputs


def peer(module: WanAutoencoder, tensors: Arrays) -> Any:
    from diffusers import AutoencoderKLWan

    config = wan_autoencoder_config(module)
    del config["_class_name"]
    model = AutoencoderKLWan(**config).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model


def run_peer(model: Any, inputs: Arrays, dtype: Any = None) -> Arrays:
    import torch

    outputs = {}
    with torch.no_grad():
        for name, array in inputs.items():
            value, frames = torch.from_numpy(np.moveaxis(array, -1, 1).copy()).to(dtype), name[1:]
            if name[0] == "z":
                outputs[f"decoded{frames}"] = model.decode(value).sample
                continue
            posterior = model.encode(value).latent_dist
            outputs |= {f"mean{frames}": posterior.mean, f"log_variance{frames}": posterior.logvar}
    return {name: first_last(value.float()) for name, value in outputs.items()}


def blocks(module: WanAutoencoder) -> tuple[tuple[str, str], ...]:
    """What has convolutions over frames, rows and columns, in the order of running."""
    pairs = []
    for piece in wan_autoencoder_rules(module).pieces:
        path, key = piece.path.split("/"), piece.key.split(".")
        if path[-2:] == ["conv_out", "kernel"]:
            pairs.append(("/".join(path[:-2]), ".".join(key[:-2])))
        elif path[-1] == "kernel" and path[1] in ("stem", "out"):
            pairs.append(("/".join(path[:-1]), ".".join(key[:-1])))
    order = [["stem", "down", "middle", "out"], ["stem", "middle", "up", "out"]]
    place = lambda half, name: order[half == "decoder"].index(name.split("_")[0])  # noqa: E731
    return tuple(sorted(pairs, key=lambda pair: (pair[0][:2] == "de", place(*pair[0].split("/")))))


def longest(arrays: Arrays) -> Arrays:
    frames = max(int(name[1:]) for name in arrays)
    return {name: value for name, value in arrays.items() if name[1:] == str(frames)}


def trace_ours(module: WanAutoencoder, params: Any, arrays: Arrays) -> dict[str, Any]:
    outputs = {}
    for name, value in longest(arrays).items():
        method, half = ("encode", "encoder") if name[0] == "x" else ("decode", "decoder")
        _, state = module.apply({"params": params}, value, method=method, capture_intermediates=True)
        layers = state["intermediates"][half].items()
        outputs |= {f"{half}/{key}": v["__call__"][0] for key, v in layers if key != "__call__"}
    return outputs


def trace_theirs(module: WanAutoencoder, tensors: Arrays, arrays: Arrays) -> Arrays:
    model, pieces = peer(module, tensors), {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, __, out, name=name: pieces.setdefault(name, []).append(out))
    run_peer(model, longest(arrays))
    return {name: first_last(np.concatenate(pieces[name], axis=2)) for _, name in blocks(module)}


class Faint(Case):
    """With small numbers in the last convolution, so that few pixels are clipped."""

    def tensors(self) -> Arrays:
        tensors = super().tensors()
        return {key: value * 0.3 if key.startswith("decoder.conv_out") else value for key, value in tensors.items()}


def case(name: str) -> Case:
    module = MODULES[name]
    return Faint(
        name,
        cache(lambda: wan_autoencoder_rules(module)),
        cache(lambda: inputs(name)),
        lambda params, inputs: ours(module, params, inputs),
        lambda tensors, inputs: run_peer(peer(module, tensors), inputs),
        blocks(module),
        lambda params, inputs: trace_ours(module, params, inputs),
        lambda tensors, inputs: trace_theirs(module, tensors, inputs),
    )


CASES = [case(name) for name in MODULES]
WHOLE, COLOUR, RESIDUAL = CASES
each = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.slow
@each
def test_equals_the_record(case: Case) -> None:
    check_record(case)


@pytest.mark.parity
@each
def test_equals_the_peer(case: Case) -> None:
    check_peer(case)


def bfloat16(case: Case) -> dict[str, Any]:
    module = MODULES[case.name].clone(compute=Compute("bfloat16"))
    params = case.rules().to_ours(case.tensors())
    return jax.jit(lambda params, inputs: ours(module, params, inputs))(params, case.inputs())


def test_bfloat16_is_close_to_float32() -> None:
    found = {name: np.asarray(value) for name, value in bfloat16(COLOUR).items()}
    assert max(distances(found, COLOUR.recorded()).values()) < 2e-2


@pytest.mark.parity
@each
def test_bfloat16_is_as_near_to_float32_as_the_peers(case: Case) -> None:
    torch = pytest.importorskip("torch")
    exact, found = case.recorded(), bfloat16(case)
    theirs = run_peer(peer(MODULES[case.name], case.tensors()).to(torch.bfloat16), case.inputs(), torch.bfloat16)
    for name, value in theirs.items():
        mine, other = (
            np.linalg.norm(each - exact[name]) / np.linalg.norm(exact[name]) for each in (found[name], value)
        )
        assert mine <= min(2e-2, 1.1 * other), (name, mine, other)


@pytest.mark.parity
@each
def test_folders_go_to_the_peer_and_come_back(case: Case, tmp_path: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    module, params = MODULES[case.name], case.rules().to_ours(case.tensors())
    save_model(tmp_path / "ours", module, params)
    model = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "ours").eval()
    assert max(distances(run_peer(model, case.inputs()), case.recorded()).values()) < 1e-6
    model.save_pretrained(tmp_path / "theirs")
    again, back = open_model(tmp_path / "theirs")
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_few_pixels_are_clipped() -> None:
    for case in CASES:
        for name, value in case.recorded().items():
            assert np.mean(np.abs(value) == 1.0) < 0.2 * name.startswith("decoded") + 1e-9, (case, name)


# Mistakes, each of which has to show.


def symmetric_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "DOWN_PADDING", ((1, 1), (1, 1)))


def future_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "PAST", (1, 1))


def first_frame_is_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two copies of itself before it, as replicating padding has it."""

    def wrong(x: Any, conv: Any) -> Any:
        return conv(jnp.concatenate([x[:, :1], x[:, :1], x], axis=1))

    monkeypatch.setattr(causal, "frames_halved", wrong)


def first_frame_is_seen_when_frames_double(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.frames_doubled
    monkeypatch.setattr(causal, "frames_doubled", lambda x, conv: right(x, lambda _: conv(x)[:, 1:]))


def pairs_of_frames_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.frames_doubled
    swapped = lambda conv: lambda x: jnp.roll(conv(x), x.shape[-1], axis=-1)  # noqa: E731
    monkeypatch.setattr(causal, "frames_doubled", lambda x, conv: right(x, swapped(conv)))


def channels_behind_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.frames_doubled

    def mixed(x: Any) -> Any:
        return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2).reshape(x.shape)

    monkeypatch.setattr(causal, "frames_doubled", lambda x, conv: right(x, lambda x: mixed(conv(x))))


def frames_attend_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.attend

    def wrong(q: Any, k: Any, v: Any, **options: Any) -> Any:
        clips = min(2, len(q))  # one frame of one clip where the parameters are drawn
        joined = [part.reshape(clips, -1, *part.shape[2:]) for part in (q, k, v)]
        return right(*joined, **options).reshape(q.shape)

    monkeypatch.setattr(causal, "attend", wrong)


def norm_without_width(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.ChannelNorm.__call__
    monkeypatch.setattr(causal.ChannelNorm, "__call__", lambda self, x: right(self, x) / x.shape[-1] ** 0.5)


def cells_with_channels_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.mean_of_cells

    def wrong(x: Any, features: int, cell: Any) -> Any:
        return right(x[..., ::-1], features, cell)[..., ::-1] if cell[0] == 2 else right(x, features, cell)

    monkeypatch.setattr(causal, "mean_of_cells", wrong)


def last_of_the_first_copies_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.repeated_in_cells

    def wrong(x: Any, features: int, cell: Any) -> Any:
        h = right(jnp.concatenate([x, x[:, :1]], axis=1), features, cell)
        return h[:, 1 : 1 + cell[0] * (x.shape[1] - 1) + 1]

    monkeypatch.setattr(causal, "repeated_in_cells", wrong)


MISTAKES = [
    symmetric_padding,
    first_frame_is_convolved,
    first_frame_is_seen_when_frames_double,
    pairs_of_frames_swapped,
    channels_behind_frames,
    future_is_seen,
    frames_attend_to_each_other,
    norm_without_width,
]
OF_RESIDUALS = [cells_with_channels_behind, last_of_the_first_copies_dropped]
QUICK = (first_frame_is_seen_when_frames_double, pairs_of_frames_swapped)
EVERY = [
    pytest.param(mistake, marks=() if mistake in QUICK else pytest.mark.slow) for mistake in (*MISTAKES, *OF_RESIDUALS)
]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("mistake", EVERY, ids=lambda mistake: mistake.__name__)
def test_mistakes_show(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    check_mutation(RESIDUAL if mistake in OF_RESIDUALS else COLOUR)


@pytest.mark.parity
@each
def test_a_failure_names_its_block(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    assert "all blocks agree" in first_difference(case)
    first_frame_is_seen_when_frames_double(monkeypatch)
    level = len(MODULES[case.name].channels) - 2
    assert f"first difference: decoder/up_{level}_0 and decoder.up_blocks.1.resnets.0 " in first_difference(case)
