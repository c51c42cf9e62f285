"""FLOPs of three denoisers by hand: formulas of their architectures, with no model, no torch and no registry.

One multiply-add is 2. What is counted: linear layers, convolutions, the two products of attention. Letters: B rows of guidance,
T frames, N tokens, c channels.
"""

from __future__ import annotations


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def conv(pixels: int, inputs: int, outputs: int, taps: int) -> int:
    """`pixels` of the output, over all rows; `taps` of the kernel."""
    return 2 * pixels * inputs * outputs * taps


def attention(rows: int, queries: int, keys: int, c: int) -> int:
    """Scores and their product with the values, over all heads: c = heads x head_dim."""
    return 2 * 2 * rows * queries * keys * c


def embedding(rows: int, inputs: int, c: int) -> int:
    """Two linear layers: of a timestep, of a text."""
    return linear(rows, inputs, c) + linear(rows, c, c)


# ---------------------------------------------------------------------------------------------------------------- Wan


def wan_1_3b(height: int, width: int, frames: int) -> int:
    """Wan 2.1 1.3B, one row: 30 blocks of width 1536, feed-forward 8960, 512 tokens of text of width 4096."""
    c, ffn, text, blocks, channels = 1536, 8960, 512, 30, 16
    n = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)  # latents are 4x8x8, patches 1x2x2
    ends = conv(n, channels, c, 1 * 2 * 2) + linear(n, c, 4 * channels)
    ends += embedding(1, 256, c) + linear(1, c, 6 * c) + embedding(text, 4096, c)
    own = 4 * linear(n, c, c) + attention(1, n, n, c)
    cross = 2 * linear(n, c, c) + 2 * linear(text, c, c) + attention(1, n, text, c)
    return ends + blocks * (own + cross + linear(n, c, ffn) + linear(n, ffn, c))


# -------------------------------------------------------------------------------------------------------------- UNets

CHANNELS, TIME = (320, 640, 1280, 1280), 1280


def feed_forward(n: int, c: int) -> int:
    """GEGLU: to twice 4c, one half of it the gate, and back."""
    return linear(n, c, 2 * 4 * c) + linear(n, 4 * c, c)


def self_attention(rows: int, n: int, c: int) -> int:
    return 4 * linear(rows * n, c, c) + attention(rows, n, n, c)


def cross_attention(rows: int, n: int, c: int, keys: int, width: int) -> int:
    return 2 * linear(rows * n, c, c) + 2 * linear(rows * keys, width, c) + attention(rows, n, keys, c)


def resnet(rows: int, n: int, inputs: int, c: int) -> int:
    """Two 3x3 convolutions, the projection of the timestep, and a 1x1 shortcut where channels change."""
    shortcut = conv(rows * n, inputs, c, 1) if inputs != c else 0
    return conv(rows * n, inputs, c, 9) + conv(rows * n, c, c, 9) + linear(rows, TIME, c) + shortcut


class Unet:
    """A UNet of four levels, two resnets each on the way down and three on the way up; `rows` = B x T pictures."""

    attending = (True, True, True, False)  # levels with transformers, from the top
    inputs = 4

    def __init__(self, height: int, width: int, frames: int, batch: int = 2) -> None:
        self.batch, self.frames, self.rows = batch, frames, batch * frames
        self.pixels = [(height // 8 >> level) * (width // 8 >> level) for level in range(4)]

    def flops(self) -> int:
        total = conv(self.rows * self.pixels[0], self.inputs, CHANNELS[0], 9) + self.times()
        skips, c = [CHANNELS[0]], CHANNELS[0]
        for level, n in enumerate(self.pixels):
            for _ in range(2):
                total += self.layer(level, n, c, CHANNELS[level])
                c = CHANNELS[level]
                skips.append(c)
            if level < 3:
                total += conv(self.rows * self.pixels[level + 1], c, c, 9)
                skips.append(c)
        total += self.middle(self.pixels[3], c)
        for level in (3, 2, 1, 0):
            for _ in range(3):
                total += self.layer(level, self.pixels[level], c + skips.pop(), CHANNELS[level])
                c = CHANNELS[level]
            if level:
                total += conv(self.rows * self.pixels[level - 1], c, c, 9)
        assert not skips
        return total + conv(self.rows * self.pixels[0], CHANNELS[0], 4, 9)

    def times(self) -> int:
        return embedding(self.batch, CHANNELS[0], TIME)


class AnimateDiff(Unet):
    """Stable Diffusion 1.5 on every frame (77 tokens of text of width 768), a motion module behind every resnet but in the
    middle."""

    text = 77, 768

    def layer(self, level: int, n: int, inputs: int, c: int) -> int:
        spatial = self.transformer(n, c) if self.attending[level] else 0
        return resnet(self.rows, n, inputs, c) + spatial + self.motion(n, c)

    def middle(self, n: int, c: int) -> int:
        return 2 * resnet(self.rows, n, c, c) + self.transformer(n, c)

    def transformer(self, n: int, c: int) -> int:
        ends = 2 * conv(self.rows * n, c, c, 1)
        attend = self_attention(self.rows, n, c) + cross_attention(self.rows, n, c, *self.text)
        return ends + attend + feed_forward(self.rows * n, c)

    def motion(self, n: int, c: int) -> int:
        """Both of its attention layers are over the frames."""
        tokens = self.rows * n
        ends = 2 * linear(tokens, c, c)
        return ends + 2 * self_attention(self.batch * n, self.frames, c) + feed_forward(tokens, c)


class SVD(Unet):
    """Each resnet with one over three frames beside it, each spatial block with a temporal one; the text is one image token."""

    inputs = 8
    image = 1, 1024

    def times(self) -> int:
        return super().times() + embedding(self.batch, 3 * 256, TIME)

    def layer(self, level: int, n: int, inputs: int, c: int) -> int:
        return self.resnets(n, inputs, c) + (self.transformer(n, c) if self.attending[level] else 0)

    def middle(self, n: int, c: int) -> int:
        return 2 * self.resnets(n, c, c) + self.transformer(n, c)

    def resnets(self, n: int, inputs: int, c: int) -> int:
        temporal = 2 * conv(self.rows * n, c, c, 3) + linear(self.rows, TIME, c)
        return resnet(self.rows, n, inputs, c) + temporal

    def transformer(self, n: int, c: int) -> int:
        tokens = self.rows * n
        ends = 2 * linear(tokens, c, c) + linear(self.rows, c, 4 * c) + linear(self.rows, 4 * c, c)  # and frame numbers
        spatial = self_attention(self.rows, n, c) + cross_attention(self.rows, n, c, *self.image)
        places = self.batch * n
        temporal = self_attention(places, self.frames, c) + cross_attention(places, self.frames, c, *self.image)
        return ends + spatial + temporal + 3 * feed_forward(tokens, c)  # one spatial, two temporal
