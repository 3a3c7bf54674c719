"""Exchanges the colors of two photographs: adaptive instance norm (AdaIN), both ways at once.

    python examples/adain.py             # writes adain/adain.png

Instance norm takes each photograph's own mean and standard deviation away, and the scale and bias
of the call put the other's in their place. Such parameters have the images' rank and broadcast
against them. A value for each sample, (N, 1, 1, C), makes AdaIN, conditional instance norm and
FiLM; along height or width too, as in SPADE, the values differ from place to place.

Huang & Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017,
equation 8: https://arxiv.org/abs/1703.06868. There x is a network's features, here it is pixels.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from sklearn.datasets import load_sample_images

import jaxnorm

# Each photograph, and the other one.
PAIRS = [("temple", "flower"), ("flower", "temple")]


def load_photographs() -> jax.Array:
    """The two photographs that ship with scikit-learn, in [0, 1], of shape (2, H, W, 3)."""
    return jnp.asarray(load_sample_images().images, jnp.float32) / 255


def colors(images: jax.Array) -> jaxnorm.Affine:
    """The scale and bias that give each image its colors, of shape (N, 1, 1, 3)."""
    m = jaxnorm.moments(images, axis=(1, 2))
    return {"scale": jnp.sqrt(m.var)[:, None, None], "bias": m.mean[:, None, None]}


def exchange(params: jaxnorm.Affine) -> jaxnorm.Affine:
    """The parameters of the two samples, each for the other."""
    return jax.tree.map(lambda a: a[::-1], params)


def slide(left: jaxnorm.Affine, right: jaxnorm.Affine, width: int) -> jaxnorm.Affine:
    """Parameters that change from left to right in equal steps, of shape (N, 1, width, 3)."""
    t = jnp.linspace(0, 1, width)[:, None]
    return jax.tree.map(lambda a, b: (1 - t) * a + t * b, left, right)


def adain(images: jax.Array, params: jaxnorm.Affine) -> jax.Array:
    """The images without their own colors, in those of the parameters."""
    y, _ = jaxnorm.instance_norm(images, params)
    return y


# What comes out


def entitle(title: str, images: jax.Array) -> dict[str, jax.Array]:
    """The images by their titles, of which the names of both photographs are a part."""
    return {title.format(*pair): image for pair, image in zip(PAIRS, images, strict=True)}


def table(pictures: dict[str, jax.Array]) -> str:
    """A row a picture: the mean and the standard deviation of each channel."""
    width = max(map(len, pictures))
    lines = [f"{'':{width}}   {'mean':^24}   {'standard deviation':^24}".rstrip()]
    lines.append(" " * width + 2 * f"   {'red':>8}{'green':>8}{'blue':>8}")
    for title, image in pictures.items():
        params = colors(image[None])
        mean, std = ("".join(f"{v:8.3f}" for v in params[k].ravel()) for k in ("bias", "scale"))
        lines.append(f"{title:{width}}   {mean}   {std}")
    return "\n".join(lines)


def draw(pictures: dict[str, jax.Array], path: Path) -> None:
    """A column for every two pictures; what a screen cannot show is clipped, and said."""
    figure = matplotlib.figure.Figure(figsize=(15, 7.8))
    figure.set_layout_engine("constrained", hspace=0.04)
    grid = figure.subplots(2, len(pictures) // 2).T.flat
    for axes, (title, image) in zip(grid, pictures.items(), strict=True):
        axes.imshow(np.clip(image, 0, 1))
        axes.set_title(title, size=14)
        axes.axis("off")
        if clipped := np.mean((image < 0) | (image > 1)):
            note = f"{clipped:.1%} of the values are clipped to [0, 1]"
            axes.text(0.5, -0.02, note, ha="center", va="top", transform=axes.transAxes, alpha=0.6)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Exchanges the colors, prints them as numbers and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("adain"), help="folder for the picture")
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"adain.py: {error}")

    photographs = load_photographs()
    own = colors(photographs)
    sliding = slide(own, exchange(own), photographs.shape[2])
    pictures = (
        entitle("the {}", photographs)
        | entitle("the {} in the {}'s colors", adain(photographs, exchange(own)))
        | entitle("the {}, sliding into the {}'s colors", adain(photographs, sliding))
    )
    print(f"{table(pictures)}\n")
    draw(pictures, options.out / "adain.png")
    print(f"wrote {options.out / 'adain.png'}")


if __name__ == "__main__":
    main()
