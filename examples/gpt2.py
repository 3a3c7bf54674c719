"""Converts GPT-2 from PyTorch to Flax, and prints the most likely next tokens.

    python examples/gpt2.py model.safetensors 464 2068 7586 21831

The file is the state dict of Hugging Face's GPT2Model or GPT2LMHeadModel, of any size, as in its
repositories: .safetensors, or .bin if PyTorch is installed. The numbers are the ids of tokens; this
example does not contain the tokenizer.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import interop
from jaxnorm.linen import LayerNorm

HEAD = 64  # channels of an attention head, in the published models of all sizes


class Block(nn.Module):
    """A transformer block: attention and two dense layers, each with a residual connection."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, T, width) to (N, T, width)."""
        n, t, width = x.shape
        y = LayerNorm(epsilon=1e-5, name="norm_0")(x)
        y = nn.Dense(3 * width, name="attention_in")(y).reshape(n, t, 3, self.heads, -1)
        y = jax.nn.dot_product_attention(y[:, :, 0], y[:, :, 1], y[:, :, 2], is_causal=True)
        x = x + nn.Dense(width, name="attention_out")(y.reshape(n, t, width))
        y = LayerNorm(epsilon=1e-5, name="norm_1")(x)
        y = nn.gelu(nn.Dense(4 * width, name="mlp_in")(y), approximate=True)
        return x + nn.Dense(width, name="mlp_out")(y)


class GPT2(nn.Module):
    """The model of Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    The defaults are those of the smallest published model.

    Attributes:
      layers: the number of blocks.
      heads: the number of attention heads, which divides the width.
      width: the number of channels.
      vocabulary: the number of tokens.
      positions: the longest sequence.
    """

    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 50257
    positions: int = 1024

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids, (N, T), to the logits of each next token, (N, T, vocabulary)."""
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(
                f"GPT2: ids should have at most {self.positions} tokens in a row, because there "
                f"are no more positions, but have {length}; write ids[:, -{self.positions}:]"
            )
        tokens = nn.Embed(self.vocabulary, self.width, name="token_embedding")
        positions = nn.Embed(self.positions, self.width, name="position_embedding")
        x = tokens(ids) + positions(jnp.arange(length))
        for k in range(self.layers):
            x = Block(self.heads, name=f"block_{k}")(x)
        return tokens.attend(LayerNorm(epsilon=1e-5, name="norm")(x))


# ---- From PyTorch ----


INSIDE = {
    "ln_1": "norm_0",
    "attn.c_attn": "attention_in",
    "attn.c_proj": "attention_out",
    "ln_2": "norm_1",
    "mlp.c_fc": "mlp_in",
    "mlp.c_proj": "mlp_out",
}


def module_names(layers: int = 12) -> dict[str, str]:
    """Returns a map from Hugging Face's names in a GPT2Model to the names in this file."""
    names = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "norm"}
    for k in range(layers):
        names |= {f"h.{k}.{torch_name}": f"block_{k}.{name}" for torch_name, name in INSIDE.items()}
    return names


def from_pytorch(state_dict: Any) -> dict[str, Any]:
    """Converts the state dict of a GPT2Model or GPT2LMHeadModel, or a file of it."""
    given = interop.to_torch(interop.from_torch(state_dict))  # also reads files
    given = {name.removeprefix("transformer."): array for name, array in given.items()}
    # The output layer shares the weight of the embedding, and the attention mask is not a weight.
    others = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")
    given = {name: array for name, array in given.items() if not name.endswith(others)}
    names = module_names(len({name.split(".")[1] for name in given if name.startswith("h.")}))
    kinds = {name: "transposed_linear" for name in names if ".c_" in name}
    convert = interop.kernels({"wte": "embedding", "wpe": "embedding", **kinds}, names=names)
    return interop.from_torch(given, names=names, convert=convert)


def model_of(variables: dict[str, Any], heads: int | None = None) -> GPT2:
    """Returns the model for the variables. heads=None means 64 channels per head, as published."""
    params = variables["params"]
    vocabulary, width = params["token_embedding"]["embedding"].shape
    heads = width // HEAD if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(f"heads should divide the width, {width}, but are {heads}; write --heads")
    layers = sum(name.startswith("block_") for name in params)
    return GPT2(layers, heads, width, vocabulary, len(params["position_embedding"]["embedding"]))


def main(arguments: list[str] | None = None) -> None:
    """Loads the weights, and prints the most likely next tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, metavar="model.safetensors")
    parser.add_argument("ids", type=int, nargs="+", metavar="ID", help="ids of tokens, in a row")
    parser.add_argument(
        "--heads", type=int, help="heads of the attention; default: one per 64 channels"
    )
    options = parser.parse_args(arguments)
    try:
        variables = from_pytorch(options.weights)
        model = model_of(variables, options.heads)
        if not all(0 <= k < model.vocabulary for k in options.ids):
            raise ValueError(f"ids should be those of {model.vocabulary} tokens: {options.ids}")
        logits: Any = model.apply(variables, jnp.array([options.ids]))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"gpt2.py: {error}")
    probabilities = np.asarray(jax.nn.softmax(logits[0, -1]))
    print("the likeliest tokens to follow:")
    for k in np.argsort(-probabilities)[:5]:
        print(f"{k:6}  {probabilities[k]:6.1%}")


if __name__ == "__main__":
    main()
