"""Models of the Hugging Face hub, through its own library: what is in the user's cache already is used where it lies.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as the library documents them.
"""

PREFIX = "hf:"
# All that is read, and never weights that are pickled.
FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors")
FILES += ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
FILES += ("vocab.json", "merges.txt", "added_tokens.json")


def fetch(name: str) -> str:
    """The folder of hf:OWNER/MODEL or hf:OWNER/MODEL@REVISION, downloaded if need be.

    ValueError: the library is missing, or there is no such model. ConnectionError: the hub cannot be reached.
    """
    try:
        from huggingface_hub import errors, snapshot_download  # for this prefix only
    except ImportError as e:
        raise ValueError(f"{name} needs the library of the hub; pip install huggingface_hub") from e
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES))
    except errors.LocalEntryNotFoundError as e:
        raise ConnectionError(f"{name}: the hub cannot be reached, and the model is not in the cache; try again") from e
    except errors.GatedRepoError as e:
        raise ValueError(f"{name}: access has to be asked for on the hub; set HF_TOKEN then") from e
    except errors.RepositoryNotFoundError as e:
        raise ValueError(f"{name}: the hub has no such model, or a private one, which needs HF_TOKEN") from e
    except errors.RevisionNotFoundError as e:
        raise ValueError(f"{name}: the model has no revision {revision!r}; leave it out for the newest") from e
    except errors.HFValidationError as e:
        raise ValueError(f"{name} is no name of a model; expected {PREFIX}OWNER/MODEL, perhaps with @REVISION") from e
    except OSError as e:  # what the library raises of its transport, and of a full disk
        raise ConnectionError(f"{name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}; try again") from e
