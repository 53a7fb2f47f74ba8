"""python -m analysis "PROMPT" [flags]"""

from analysis.inside import main
from console import command

if __name__ == "__main__":
    command.run(main)
