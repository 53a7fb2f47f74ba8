"""A model by its name: fetch what is missing, read what is there, check that it fits together.

    python utils.py verify MODEL_SIZE

A name is a folder of models_dir, a path, or hf:OWNER/MODEL. A folder holds OpenAI's files, Hugging Face's or nanoGPT's,
which checkpoints/ reads; all become the same hparams and params.
"""

import functools
import os
import sys
from collections.abc import Callable

from checkpoints import DOWNLOAD_AGAIN
from checkpoints.files import check_files
from checkpoints.openai import (
    CHECKPOINT,
    DATA,
    HPARAMS,
    INDEX,
    MAX_SIZES,
    MODEL_FILES,
    OPENAI_SIZES,
    check_file,
    check_heads,
    download_model,
    files_of,
    missing_files,
    need_crc32c,
    read_hparams,
)
from checkpoints.tensorflow import read_checkpoint
from checkpoints.weights import check_finite, n_weights, nest_params
from encoder import MODELS_DIR, CharacterEncoder, Encoder, check_token_ids, get_encoder, rank_merges

CONFIG, NANOGPT, META = "config.json", "ckpt.pt", "meta.pkl"

# ----------------------------------------------------------------------------------------------------------------------
# Where a model is
# ----------------------------------------------------------------------------------------------------------------------


def kind_of(path: str) -> str | None:
    """Whose files a folder holds: openai, huggingface or nanogpt; None where it holds no model."""
    if any(os.path.exists(os.path.join(path, name)) for name in MODEL_FILES):
        return "openai"
    if os.path.exists(os.path.join(path, CONFIG)):
        return "huggingface"
    is_nanogpt = path.endswith(".pt") and os.path.exists(path)
    return "nanogpt" if is_nanogpt or os.path.exists(os.path.join(path, NANOGPT)) else None


def nanogpt_file(path: str) -> str:
    return path if path.endswith(".pt") else os.path.join(path, NANOGPT)


def models_in(models_dir: str) -> list[str]:
    """The folders of `models_dir` that hold a model."""
    if not os.path.isdir(models_dir):
        return []
    kinds = {name: kind_of(os.path.join(models_dir, name)) for name in sorted(os.listdir(models_dir))}
    return [
        name
        for name, kind in kinds.items()
        if kind and (kind != "openai" or os.path.exists(os.path.join(models_dir, name, INDEX)))
    ]


def path_of(model_size: str, models_dir: str) -> str:
    """A folder of `models_dir`, or else a path from where one is."""
    path = os.path.join(models_dir, model_size)
    return model_size if os.sep in model_size and not os.path.exists(path) else path


def find_model(model_size: str, models_dir: str) -> str:
    """The folder of a model, or a .pt file, after fetching what is missing. ValueError: there is no such model."""
    if model_size.startswith("hf:"):
        from checkpoints import hub  # and with it a library that others do not need

        return hub.fetch(model_size)
    path = path_of(model_size, models_dir)
    kind, missing = kind_of(path) if model_size else None, missing_files(path)
    if model_size in OPENAI_SIZES and kind in ("openai", None) and missing:
        download_model(model_size, models_dir)
    elif kind is None:
        here = ", ".join(name for name in models_in(models_dir) if name not in OPENAI_SIZES) or "none"
        raise ValueError(
            f"no model {model_size!r}: OpenAI's sizes are {', '.join(OPENAI_SIZES)}; others in {models_dir}: {here}; "
            "a path and hf:OWNER/MODEL are names too"
        )
    elif kind == "openai" and missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; copy the whole model there")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def check_encoder(encoder: Encoder, hparams: dict, path: str) -> Encoder:
    """ValueError: tokens that the model has not, or ids without a token."""
    if max(encoder.tokens) >= hparams["n_vocab"]:
        raise ValueError(
            f"{path}: its vocabulary has ids up to {max(encoder.tokens)}, its hyper-parameters say "
            f"{hparams['n_vocab']} tokens; the files must belong to one model"
        )
    if holes := set(range(max(encoder.tokens))) - encoder.tokens.keys():
        raise ValueError(
            f"{path}: its vocabulary has no token for id {min(holes)}, which the model could choose; "
            "the files must belong to one model"
        )
    return encoder


def only_tokens(encoder: Encoder, hparams: dict, params: dict) -> tuple[dict, dict]:
    """The model without the last rows of wte where those have no token, as in a padded vocabulary: never chosen."""
    n_vocab = max(encoder.tokens) + 1
    if n_vocab == hparams["n_vocab"]:
        return hparams, params
    output = {"lm_head": params["lm_head"][:, :n_vocab]} if "lm_head" in params else {}
    return hparams | {"n_vocab": n_vocab}, params | {"wte": params["wte"][:n_vocab]} | output


def read_openai(folder: str) -> tuple[Encoder, dict, dict]:
    check_files(folder, files_of(folder), MAX_SIZES, DOWNLOAD_AGAIN)
    hparams = read_hparams(os.path.join(folder, HPARAMS))
    encoder = check_encoder(openai_encoder(folder), hparams, folder)
    return encoder, hparams, read_checkpoint(os.path.join(folder, CHECKPOINT))


def openai_encoder(folder: str) -> Encoder:
    models_dir, name = os.path.split(folder)
    return get_encoder(name, models_dir)


def read_huggingface(folder: str) -> tuple[Encoder, dict, dict]:
    from checkpoints.huggingface import read_huggingface  # which OpenAI's models do not need

    hparams, config, variables = read_huggingface(folder)
    return check_encoder(huggingface_encoder(folder, hparams, config), hparams, folder), hparams, variables


def huggingface_encoder(folder: str, hparams: dict, config: dict) -> Encoder:
    from checkpoints.huggingface import special_ids
    from checkpoints.vocabulary import read_vocabulary

    eot_ids, start_id = special_ids(folder, config, hparams["n_vocab"])
    found = read_vocabulary(folder).within(hparams["n_vocab"])
    token_ids = check_token_ids(found.token_ids, found.path, found.added)
    ranks = rank_merges(found.merges, token_ids, found.path)
    return Encoder(token_ids, ranks, found.added, found.patterns, eot_ids, start_id, found.adds_space)


def read_nanogpt(path: str, models_dir: str, gelu: str | None, vocabulary: str | None) -> tuple[Encoder, dict, dict]:
    """A ckpt.pt, with the characters of the meta.pkl beside it, or the vocabulary of another model, as 124M."""
    from checkpoints import nanogpt  # which others do not need

    path = nanogpt_file(path)
    meta = os.path.join(os.path.dirname(path), META)
    names = [os.path.basename(path)] + [META] * os.path.exists(meta)
    check_files(os.path.dirname(path), names, {META: nanogpt.MAX_META}, nanogpt.SAVE_AGAIN)
    hparams, variables = nanogpt.read_nanogpt(path, gelu or "erf")
    if gelu is None:
        print(f"{path}: GELU by its formula; --gelu tanh is for models trained before June 2023", file=sys.stderr)
    if vocabulary is None and os.path.exists(meta):
        encoder: Encoder = CharacterEncoder(nanogpt.read_meta(meta))
    else:
        encoder = vocabulary_of(vocabulary or "124M", models_dir, f"{path} has no {META} beside it")
    return check_encoder(encoder, hparams, path), hparams, variables


def vocabulary_of(model_size: str, models_dir: str, why: str) -> Encoder:
    """The encoder of another model. ValueError: there is no such model."""
    folder = path_of(model_size, models_dir)
    if kind_of(folder) == "huggingface":
        from checkpoints.huggingface import read_config

        return huggingface_encoder(folder, *read_config(os.path.join(folder, CONFIG)))
    try:
        return openai_encoder(folder)
    except FileNotFoundError as e:
        raise ValueError(f"{why}, and {e.filename} is missing; --vocabulary names a model whose tokens it has") from e


def reader_of(path: str, models_dir: str, gelu: str | None, vocabulary: str | None) -> Callable:
    """The function that reads a model: path -> (encoder, hparams, variables by OpenAI's names)."""
    kinds = {"openai": read_openai, "huggingface": read_huggingface}
    nanogpt = functools.partial(read_nanogpt, models_dir=models_dir, gelu=gelu, vocabulary=vocabulary)
    return kinds.get(kind_of(path) or "", nanogpt)


def load_encoder_hparams_and_params(
    model_size: str | os.PathLike[str],
    models_dir: str | None = None,
    gelu: str | None = None,
    vocabulary: str | None = None,
) -> tuple[Encoder, dict, dict]:
    """(encoder, hparams, params) of a model; an OpenAI size is downloaded first if need be.

    `model_size` is a folder of `models_dir` (the folder beside the programs unless given), a path, or hf:OWNER/MODEL.
    Only for nanoGPT's models: `gelu`, erf or tanh, and `vocabulary`, the name of a model that has the same tokens.

    The weights are float32 views of the mapped files, nested as in picoGPT: params["wte"],
    params["blocks"][i]["attn"]["c_attn"]["w"] ...

    ValueError: no such model, or a damaged one. ConnectionError: it could not be fetched.
    """
    models_dir = MODELS_DIR if models_dir is None else models_dir
    path = find_model(os.fspath(model_size), models_dir)
    encoder, hparams, variables = reader_of(path, models_dir, gelu, vocabulary)(path)
    return encoder, *only_tokens(encoder, hparams, nest_params(variables, hparams, path))


# ----------------------------------------------------------------------------------------------------------------------
# Verifying what is on disk
# ----------------------------------------------------------------------------------------------------------------------


def checks_of_others(path: str, read: Callable) -> list[Callable[[], object]]:
    """What is checked of a model of Hugging Face or nanoGPT, which `read` reads."""
    read = functools.cache(read)  # once for all checks, as what it says on stderr
    checks: list[Callable[[], object]] = [lambda: read(path), lambda: check_finite(read(path)[2], path)]
    if kind_of(path) == "nanogpt":
        from checkpoints.nanogpt import verify_nanogpt

        checks.append(lambda: verify_nanogpt(nanogpt_file(path)))
    return [*checks, lambda: nest_params(*read(path)[:0:-1], path)]


def checks_of(model_size: str, path: str) -> list[Callable[[], object]]:
    """What is checked of OpenAI's files, each a function that raises ValueError or FileNotFoundError."""
    hparams_path, prefix = os.path.join(path, HPARAMS), os.path.join(path, CHECKPOINT)
    return [
        lambda: check_files(path, files_of(path), MAX_SIZES, DOWNLOAD_AGAIN),
        *(functools.partial(check_file, model_size, name, os.path.join(path, name), path) for name in MODEL_FILES),
        lambda: check_heads(model_size, hparams_path),
        lambda: openai_encoder(path),
        lambda: check_encoder(openai_encoder(path), read_hparams(hparams_path), path),
        lambda: nest_params(read_checkpoint(prefix), read_hparams(hparams_path), prefix),
        lambda: check_finite(read_checkpoint(prefix), prefix),
    ]


def find_problems(model_size: str, models_dir: str, vocabulary: str | None = None) -> list[str]:
    """What is wrong with a model on disk. Later checks are made too if an earlier one fails."""
    path = path_of(model_size, models_dir)
    if kind_of(path) in ("huggingface", "nanogpt"):
        missing, checks = [], checks_of_others(path, reader_of(path, models_dir, "erf", vocabulary))
    else:
        missing, checks = missing_files(path), checks_of(model_size, path)
    # A set in order: some checks find the same.
    problems: dict[str, None] = {f"{os.path.join(path, name)} is missing": None for name in missing}
    for check in checks:
        try:
            check()
        except FileNotFoundError as e:
            problems[f"{e.filename} is missing"] = None
        except ValueError as e:
            problems[str(e)] = None
    return list(problems)


def what_was_checked(model_size: str, kind: str) -> str:
    if model_size in OPENAI_SIZES:
        return "every published checksum right"
    if kind == "openai":
        return f"the checksums of {DATA} and {INDEX} right; {HPARAMS} and the vocabulary have none"
    return "the checksums of its records right" if kind == "nanogpt" else "the format has no checksums"


def verify(model_size: str, *, models_dir: str = MODELS_DIR, vocabulary: str | None = None):
    """Check a model on disk: python utils.py verify MODEL_SIZE [flags]

    MODEL_SIZE           124M, 355M, 774M or 1558M, a folder of models_dir, or a path
    --models_dir models  where the models are, beside the programs unless given
    --vocabulary 124M    of nanoGPT's models without a meta.pkl: the model with the same tokens

    Reads every byte: checksums, those that are published among them, hyper-parameters, the vocabulary, whether the
    shapes are the model's, and whether all weights are finite. Status 1: something is wrong.
    """
    path = path_of(model_size, models_dir)
    kind = kind_of(path)
    if not model_size or not kind:
        here = ", ".join(models_in(models_dir)) or "none"
        raise ValueError(f"no model {model_size!r} in {models_dir}; there: {here}; gpt2.py downloads OpenAI's sizes")
    if kind == "openai":
        need_crc32c(model_size)
    problems = find_problems(model_size, models_dir, vocabulary)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{path}: problems found: {len(problems)}; replace what they name")
    _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir, "erf", vocabulary)
    print(
        f"{path}: OK: {n_weights(params)} finite weights in {hparams['n_layer']} layers, {hparams['n_vocab']} tokens, "
        + what_was_checked(model_size, kind),
        file=sys.stderr,
    )


def convert(
    model_size: str,
    out: str,
    *,
    format: str = "",
    models_dir: str = MODELS_DIR,
    gelu: str | None = None,
    vocabulary: str | None = None,
):
    """Write a model to a folder of another form: python utils.py convert MODEL_SIZE OUT --format FORMAT [flags]

    MODEL_SIZE            any model, downloaded if need be; OUT is the folder to write, new or empty
    --format huggingface  as transformers saves it: model.safetensors, config.json, tokenizer.json and others
    --format openai       as OpenAI's files; what they cannot express, such as another activation, is refused
    --models_dir models   where the models are, beside the programs unless given
    --gelu erf            of nanoGPT's models: erf, or tanh for those trained before June 2023
    --vocabulary 124M     of nanoGPT's models without a meta.pkl: the model with the same tokens

    Every bit of the weights is kept. All files get their names when all are complete; none is overwritten.
    """
    from checkpoints.convert import check_target, write_model  # which loading a model does not need

    check_target(out, format, path_of(model_size, models_dir))  # all mistakes are found before a model is downloaded
    model = load_encoder_hparams_and_params(model_size, models_dir, gelu, vocabulary)
    print(f"{out}: {model_size} as {format}: {write_model(*model, out, format)}", file=sys.stderr)


if __name__ == "__main__":
    from console import command  # the others who read models have their own command line

    command.run({"verify": verify, "convert": convert})
