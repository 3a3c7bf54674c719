"""Exchanges the colors of two photographs: adaptive instance norm (AdaIN), both ways at once.

    python examples/adain.py             # writes adain/adain.png

Instance norm removes the mean and the standard deviation of each photograph, and the scale and bias
of the call replace them by those of the other one. Such parameters have the rank of the images and
broadcast against them. With one value per sample, (N, 1, 1, C), they give AdaIN, conditional
instance norm and FiLM. With values along height or width, as in SPADE, they vary in space.

Huang & Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017,
equation 8: https://arxiv.org/abs/1703.06868. There x is the features of a network; here it is
pixels.
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

# Each photograph is paired with the other one.
PAIRS = [("temple", "flower"), ("flower", "temple")]


def load_photographs() -> jax.Array:
    """Returns the two photographs of scikit-learn, in [0, 1], of shape (2, H, W, 3)."""
    return jnp.asarray(load_sample_images().images, jnp.float32) / 255


def colors(images: jax.Array) -> jaxnorm.Affine:
    """Returns the scale and bias that give each image its colors, of shape (N, 1, 1, 3)."""
    m = jaxnorm.moments(images, axis=(1, 2))
    return {"scale": jnp.sqrt(m.var)[:, None, None], "bias": m.mean[:, None, None]}


def exchange(params: jaxnorm.Affine) -> jaxnorm.Affine:
    """Exchanges the parameters of the two samples."""
    return jax.tree.map(lambda a: a[::-1], params)


def slide(left: jaxnorm.Affine, right: jaxnorm.Affine, width: int) -> jaxnorm.Affine:
    """Returns parameters that change linearly from left to right, of shape (N, 1, width, 3)."""
    t = jnp.linspace(0, 1, width)[:, None]
    return jax.tree.map(lambda a, b: (1 - t) * a + t * b, left, right)


def adain(images: jax.Array, params: jaxnorm.Affine) -> jax.Array:
    """Returns the images with the colors of the parameters instead of their own."""
    y, _ = jaxnorm.instance_norm(images, params)
    return y


# Output


def entitle(title: str, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the images by their titles, which contain the names of both photographs."""
    return {title.format(*pair): image for pair, image in zip(PAIRS, images, strict=True)}


def table(pictures: dict[str, jax.Array]) -> str:
    """Returns a table of the mean and the standard deviation of each channel of each picture."""
    width = max(map(len, pictures))
    lines = [f"{'':{width}}   {'mean':^24}   {'standard deviation':^24}".rstrip()]
    lines.append(" " * width + 2 * f"   {'red':>8}{'green':>8}{'blue':>8}")
    for title, image in pictures.items():
        params = colors(image[None])
        mean, std = ("".join(f"{v:8.3f}" for v in params[k].ravel()) for k in ("bias", "scale"))
        lines.append(f"{title:{width}}   {mean}   {std}")
    return "\n".join(lines)


def draw(pictures: dict[str, jax.Array], path: Path) -> None:
    """Draws two pictures per column; values outside [0, 1] are clipped and counted in a note."""
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
        | entitle("the {}, gradually in the {}'s colors", adain(photographs, sliding))
    )
    print(f"{table(pictures)}\n")
    draw(pictures, options.out / "adain.png")
    print(f"wrote {options.out / 'adain.png'}")


if __name__ == "__main__":
    main()
