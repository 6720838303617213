"""Two of apex's kernels over many tensors (csrc/multi_tensor_adam.cu at 004da4ed), in fp32 as there, with what they do
besides: they skip an empty tensor's neighbours where it comes last, and the capturable one writes gradients."""

import torch


def _update(lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay):
    assert mode == bias_correction == 1
    assert {tensor.dtype for tensors in lists for tensor in tensors} == {torch.float32}
    assert all(tensor.is_contiguous() for tensors in lists for tensor in tensors)
    assert lists[0][-1].numel()
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        p.sub_(lr * (m / (1 - beta1**step) / denominator + weight_decay * p))


def multi_tensor_adam(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay
):
    assert isinstance(step, int)
    assert noop_flag.dtype == torch.int32
    _update(tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay)


def multi_tensor_adam_capturable(
    chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay, inv_scale
):
    assert noop_flag.dtype == step.dtype == torch.int32
    assert lr.dtype == inv_scale.dtype == torch.float32
    if noop_flag.item() == 1:
        return
    for g in tensor_lists[0]:
        g.mul_(inv_scale)
    _update(tensor_lists, lr.item(), beta1, beta2, epsilon, step.item(), mode, bias_correction, weight_decay)


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor_python=None):
    (tensors,) = tensor_lists
    return torch.stack([x.float().square().sum() for x in tensors]).sum().sqrt().reshape(1), torch.empty(0)
