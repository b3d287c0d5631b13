"""`python -m gtpo_megatron`, which is what torchrun starts."""

from gtpo_megatron.commands.cli import main

if __name__ == "__main__":
    main()
