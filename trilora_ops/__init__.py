"""Adapter mathematics, files and names: plain PyTorch, no host.

Glossary (symbols as in the papers; every matrix of a convolution is flattened to two axes):
    W0      frozen weight, (out, columns); columns = in for a linear layer, in*kh*kw for a convolution
    W'      adapted weight, W' = W0*T + R
    T       transform, (in, in); the identity for LoRA, LoCon and TriLoRA
    R       residual, (out, columns); s * U * C * Vt for TriLoRA, s * up * down for LoRA
    U, C, Vt  TriLoRA's factors: (out, r2), (r2, r1) or the diagonal sigma (r,), (r1, columns)
    r       rank; alpha: the scale's numerator, s = alpha / r (unitless)
    lambda  strength at which an adapter is applied; 0 = base model, 1 = trained model
    sigma   singular value in `factors`, noise level in `training`
"""
