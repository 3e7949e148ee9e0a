"""What capturing costs: a forward of a 0.6B Qwen3 under hooks, beside the same forward bare.

    python benchmarks/capture.py [--layers 28] [--repeat 5]

64 tokens, float32, random weights, `sdpa`, all in one process. Bare and captured forwards alternate, so that what else
the machine does falls on both; the ratio is of the medians, after one of each to warm up. The captured one includes the
copies to numpy, not the writing of the dump.
"""

import argparse
import statistics
import time

import torch
import transformers

import svf

TOKENS = list(range(3, 67))


def model_of(layers: int) -> transformers.PreTrainedModel:
    """A random model of Qwen3-0.6B's shape."""
    config = transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    model, ids = model_of(asked.layers), torch.tensor([TOKENS])

    def bare() -> None:
        model(ids, use_cache=False)

    def captured() -> None:
        with svf.capture(model):
            model(ids, use_cache=False)

    def deep() -> None:
        with svf.capture(model, deep=True):
            model(ids, use_cache=False)

    ways = (bare, captured, deep)
    seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
    with torch.inference_mode():
        for number in range(asked.repeat + 1):
            for way in ways:
                began = time.perf_counter()
                way()
                if number:
                    seconds[way.__name__].append(time.perf_counter() - began)
    least = statistics.median(seconds["bare"])
    for name, all_of_them in seconds.items():
        middle = statistics.median(all_of_them)
        print(f"{name:9} {middle:.3f} s ({min(all_of_them):.3f} to {max(all_of_them):.3f}), {middle / least:.2f} x")


if __name__ == "__main__":
    main()
