"""python -m batch prompts.jsonl --output out.jsonl [flags]"""

if __name__ == "__main__":
    from console.start import start

    start()  # before the other imports, which take most of a short run

from batch.run import main
from console import command

if __name__ == "__main__":
    command.run(main)
