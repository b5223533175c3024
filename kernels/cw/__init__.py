"""cwfast's Triton kernels; installed as cwfast.kernels. Imports torch and triton only."""
