"""CUDA kernels in Triton, one file per operator, written for sm_80, sm_90 and sm_100."""
