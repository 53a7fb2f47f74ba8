"""Files of weights, read into named arrays."""

DOWNLOAD_AGAIN = "delete the file and run again to download it"  # the way out of a damaged one
COPY_AGAIN = "copy the file again"  # out of one that is not downloaded here
OPENAI_SIZES, OPENAI_N_CTX = ("124M", "355M", "774M", "1558M"), 1024


class Damaged(Exception):
    """Bytes that are not what a format says; callers add the file's name."""
