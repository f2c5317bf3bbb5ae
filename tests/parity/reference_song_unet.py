"""EDM's SongUNet in PyTorch, written from its description alone: names of parameters, shapes and formulas.

It shares no code with the network that it checks: levels are plain lists, the filter is applied by padding and slicing
an image four times, and attention is spelled out.
"""

import math

import pytest

torch = pytest.importorskip("torch")  # what collects doctests imports this file too
nn, functional = torch.nn, torch.nn.functional


def groups(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Resampling(nn.Module):
    """What holds a filter; `kernel` 0 has no weights."""

    def __init__(self, inputs, outputs, kernel, line=None, mode=None, late=False):
        super().__init__()
        self.mode, self.late, self.kernel = mode, late, kernel
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(outputs))
        if mode is not None:
            line = torch.tensor(line, dtype=torch.float32)
            self.register_buffer("resample_filter", torch.outer(line, line)[None, None] / line.sum() ** 2)

    def convolve(self, x, extra=0):
        if not self.kernel:
            return x
        return functional.conv2d(x, self.weight, padding=self.kernel // 2 + extra)

    def forward(self, x):
        if self.late:  # convolve first, with zeros enough for the filter, which then needs none
            x = halve(self.convolve(x, (self.resample_filter.shape[-1] - 1) // 2), self.resample_filter[0, 0], 0)
        else:
            if self.mode == "down":
                size = self.resample_filter.shape[-1]
                x = halve(x, self.resample_filter[0, 0], (size - 1) // 2)
            if self.mode == "up":
                x = double(x, self.resample_filter[0, 0])
            x = self.convolve(x)
        return x + self.bias[:, None, None] if self.kernel else x


def halve(x, taps, pad):
    """Every second place of the filtered image, tap by tap."""
    x = functional.pad(x, (pad,) * 4)
    size = len(taps)
    height, width = (x.shape[2] - size) // 2 + 1, (x.shape[3] - size) // 2 + 1
    out = torch.zeros(*x.shape[:2], height, width)
    for i in range(size):
        for j in range(size):
            out += taps[i, j] * x[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
    return out


def double(x, taps):
    """Every pixel spreads the filter, times four, onto the finer image around it."""
    size = len(taps)
    crop = (size - 1) // 2
    batch, channels, height, width = x.shape
    out = torch.zeros(batch, channels, 2 * (height - 1) + size, 2 * (width - 1) + size)
    for i in range(size):
        for j in range(size):
            out[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2] += 4 * taps[i, j] * x
    return out[:, :, crop : crop + 2 * height, crop : crop + 2 * width]


class Block(nn.Module):
    def __init__(self, inputs, outputs, emb, line, mode=None, attention=False):
        super().__init__()
        self.inputs, self.attention = inputs, attention
        self.norm0 = groups(inputs)
        self.conv0 = Resampling(inputs, outputs, 3, line, mode)
        self.affine = nn.Linear(emb, outputs)
        self.norm1 = groups(outputs)
        self.conv1 = Resampling(outputs, outputs, 3)
        self.skip = Resampling(inputs, outputs, 1, line, mode) if mode or inputs != outputs else None
        if attention:
            self.norm2 = groups(outputs)
            self.qkv = Resampling(outputs, 3 * outputs, 1)
            self.proj = Resampling(outputs, outputs, 1)

    def forward(self, x, emb):
        h = self.conv0(functional.silu(self.norm0(x)))
        h = functional.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        x = math.sqrt(0.5) * ((x if self.skip is None else self.skip(x)) + self.conv1(h))
        if self.attention:
            batch, channels, height, width = x.shape
            rows = self.qkv(self.norm2(x)).reshape(batch, channels, 3, height * width)
            q, k, v = rows[:, :, 0], rows[:, :, 1], rows[:, :, 2]
            weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(channels), dim=-1)
            x = math.sqrt(0.5) * (x + self.proj((v @ weights.transpose(1, 2)).reshape(x.shape)))
        return x


class Fourier(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("freqs", torch.empty(features // 2))


class SongUNet(nn.Module):
    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim,
        augment_dim,
        model_channels,
        channel_mult,
        channel_mult_emb,
        num_blocks,
        attn_resolutions,
        embedding_type,
        channel_mult_noise,
        encoder_type,
        decoder_type,
        resample_filter,
        dropout=0.0,
    ):
        super().__init__()
        line, emb, features = resample_filter, model_channels * channel_mult_emb, model_channels * channel_mult_noise
        self.features, self.classes = features, label_dim
        if embedding_type == "fourier":
            self.map_noise = Fourier(features)
        if label_dim:
            self.map_label = nn.Linear(label_dim, features)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, features, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(features, emb), nn.Linear(emb, emb)

        sides = [img_resolution // 2**level for level in range(len(channel_mult))]
        widths = [model_channels * mult for mult in channel_mult]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{sides[0]}x{sides[0]}_conv"] = Resampling(in_channels, model_channels, 3)
        width, image, skips = model_channels, in_channels, [model_channels]
        for level, side in enumerate(sides):
            if level > 0:
                self.enc[f"{side}x{side}_down"] = Block(width, width, emb, line, "down")
                if encoder_type == "skip":
                    self.enc[f"{side}x{side}_aux_down"] = Resampling(image, image, 0, line, "down")
                    self.enc[f"{side}x{side}_aux_skip"] = Resampling(image, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{side}x{side}_aux_residual"] = Resampling(image, width, 3, line, "down", late=True)
                    image = width
                skips.append(width)
            for i in range(num_blocks):
                attention = side in attn_resolutions
                self.enc[f"{side}x{side}_block{i}"] = Block(width, widths[level], emb, line, attention=attention)
                width = widths[level]
                skips.append(width)
        for level in range(len(sides) - 1, -1, -1):
            side = sides[level]
            if level == len(sides) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(width, width, emb, line, attention=True)
                self.dec[f"{side}x{side}_in1"] = Block(width, width, emb, line)
            else:
                self.dec[f"{side}x{side}_up"] = Block(width, width, emb, line, "up")
            for i in range(num_blocks + 1):
                attention = i == num_blocks and side in attn_resolutions
                inputs = width + skips.pop()
                self.dec[f"{side}x{side}_block{i}"] = Block(inputs, widths[level], emb, line, attention=attention)
                width = widths[level]
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < len(sides) - 1:
                    self.dec[f"{side}x{side}_aux_up"] = Resampling(out_channels, out_channels, 0, line, "up")
                self.dec[f"{side}x{side}_aux_norm"] = groups(width)
                self.dec[f"{side}x{side}_aux_conv"] = Resampling(width, out_channels, 3)

    def embedding(self, noise, label, augment):
        half = self.features // 2
        if hasattr(self, "map_noise"):
            frequencies = 2 * math.pi * self.map_noise.freqs
        else:
            frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float32) / (half - 1))
        angles = noise[:, None] * frequencies
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self.classes:
            emb = emb + self.map_label(label * math.sqrt(self.classes))
        if augment is not None:
            emb = emb + self.map_augment(augment)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(emb))))

    def forward(self, x, noise, label=None, augment=None):
        """`label` [batch, classes] is one-hot, or zero for "no class"."""
        emb = self.embedding(noise, label, augment)
        skips, image = [], x
        for key, part in self.enc.items():
            if key.endswith("aux_down"):
                image = part(image)
            elif key.endswith("aux_skip"):
                x = x + part(image)
                skips[-1] = x
            elif key.endswith("aux_residual"):
                x = image = (x + part(image)) / math.sqrt(2)
                skips[-1] = x
            else:
                x = part(x, emb) if isinstance(part, Block) else part(x)
                skips.append(x)
        out = normed = None
        for key, part in self.dec.items():
            if key.endswith("aux_up"):
                out = part(out)
            elif key.endswith("aux_norm"):
                normed = part(x)
            elif key.endswith("aux_conv"):
                new = part(functional.silu(normed))
                out = new if out is None else out + new
            else:
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in key else x
                x = part(x, emb)
        return out
