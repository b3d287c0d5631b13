"""Everything that touches Megatron-Core. Importing this package prepares the machine for it (see `platform`)."""

from gtpo_megatron.policy import platform

platform.install()
