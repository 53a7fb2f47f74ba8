"""What the README claims about speed, measured: one subcommand a table, each as CSV, Markdown and PNG in a folder.

    python -m benchmarks rows --model_size random:124M
    python -m benchmarks all

The files go to benchmarks/results in the current folder. Ratios are of one run: what is compared is measured in turn,
turn by turn where a table has ratios to one program, and medians are quoted with their spread (the quartiles).
random:124M has random weights of the real shapes. Peers that are installed get the same weights and tokens.
"""
