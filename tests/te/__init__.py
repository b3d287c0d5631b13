"""Transformer Engine's own Python layers on CPUs, over PyTorch stand-ins for its kernels.

What passes here proves names, shapes, flow, scaling and resume. It proves nothing about kernels, speed or memory on a GPU.
"""
