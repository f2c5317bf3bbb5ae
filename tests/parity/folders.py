"""Small systems with random weights, written by diffusers itself; needs PyTorch."""

from pathlib import Path
from typing import Any

import pytest
from parity.harness import random_tensor

torch = pytest.importorskip("torch", reason="torch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MERGES = [("r", "e"), ("re", "d</w>"), ("b", "o"), ("a", "t</w>"), ("bo", "at</w>")]


def drawn(network: Any) -> Any:
    """The same network, its parameters drawn by key and shape."""
    state = network.state_dict()
    left = ("pos_embed.pos_embed", "position_ids", "encoder.embed_tokens.weight")  # tables, and what is tied
    with torch.no_grad():
        for name, value in state.items():
            if not name.endswith(left) and value.is_floating_point():
                value.copy_(torch.from_numpy(random_tensor(name, tuple(value.shape))))
    return network.eval()


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in MERGES]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=MERGES, pad_token=pad, model_max_length=77)


def clip(width: int, projection: int | None = None, *, activation: str = "quick_gelu") -> Any:
    tokenizer = clip_tokenizer()
    end = tokenizer.eos_token_id
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=projection or width,
        hidden_act=activation,
        eos_token_id=end,
        bos_token_id=end - 1,
        pad_token_id=end,
    )
    return drawn((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config))


def t5_tokenizer() -> Any:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        ("▁", -2.0),
        ("▁red", -3.0),
        ("▁boat", -3.5),
        ("▁a", -2.5),
    ]
    pieces += [(chr(c), -5.0 - c / 100) for c in range(97, 123)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def t5(width: int) -> Any:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return drawn(transformers.T5EncoderModel(config))


def autoencoder(channels: int, *, quantize: bool = True, **constants: float) -> Any:
    return drawn(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            use_quant_conv=quantize,
            use_post_quant_conv=quantize,
            **constants,
        )
    )


def stable_diffusion_3(*, with_t5: bool = True, **options: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=24 + 16,
        pos_embed_max_size=24,
        **options,
    )
    return diffusers.StableDiffusion3Pipeline(
        drawn(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        autoencoder(4, quantize=False, scaling_factor=1.5305, shift_factor=0.0609),
        clip(24, 24),
        clip_tokenizer(),
        clip(32, 16, activation="gelu"),
        clip_tokenizer("!"),
        t5(64) if with_t5 else None,
        t5_tokenizer() if with_t5 else None,
    )


def flux(*, guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        autoencoder(4, quantize=False, scaling_factor=0.3611, shift_factor=0.1159),
        clip(24),
        clip_tokenizer(),
        t5(32),
        t5_tokenizer(),
        drawn(transformer),
    )


DISCRETE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion(*, prediction: str = "epsilon", plms: bool = False) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    scheduler = diffusers.DDIMScheduler(
        **DISCRETE, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    if plms:
        scheduler = diffusers.PNDMScheduler(
            **DISCRETE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
        )
    return diffusers.StableDiffusionPipeline(
        autoencoder(4), clip(24), clip_tokenizer(), drawn(unet), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(*, spacing: str = "leading", offset: int = 1) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24 + 32,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**DISCRETE, timestep_spacing=spacing, steps_offset=offset)
    return diffusers.StableDiffusionXLPipeline(
        autoencoder(4, scaling_factor=0.13025),
        clip(24),
        clip(32, 16, activation="gelu"),
        clip_tokenizer(),
        clip_tokenizer("!"),
        drawn(unet),
        scheduler,
        add_watermarker=False,
    )


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    return diffusers.PixArtAlphaPipeline(
        t5_tokenizer(), t5(32), autoencoder(4), drawn(transformer), diffusers.DPMSolverMultistepScheduler()
    )


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        num_embeds_ada_norm=1000,
    )
    network = drawn(transformer)
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return diffusers.DiTPipeline(network, autoencoder(4), diffusers.DDIMScheduler(clip_sample=False))


SYSTEMS = {
    "sd3": stable_diffusion_3,
    "sd3_without_t5": lambda: stable_diffusion_3(with_t5=False),
    "sd35": lambda: stable_diffusion_3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux_dev": flux,
    "flux_schnell": lambda: flux(guidance=False),
    "sd15": stable_diffusion,
    "sd15_plms": lambda: stable_diffusion(plms=True),
    "sd2_v": lambda: stable_diffusion(prediction="v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sdxl_trailing": lambda: stable_diffusion_xl(spacing="trailing", offset=0),
    "pixart": pixart,
    "dit": dit,
}


def write(name: str, folder: Path) -> Any:
    """Makes a system, and lets diffusers write it."""
    torch.set_num_threads(1)
    pipeline = SYSTEMS[name]()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline
