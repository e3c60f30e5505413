"""What a training step computes, written out in float64 from the papers' formulas, on the tiny problem.

Nothing of the training code is used but the names of its generators: the adapted layers are W + scale * up down,
the loss is a sum over samples and pixels, and autograd does the rest.
"""

import math

import torch
import torch.nn.functional as F

from modular_concepts.models.schedules import FlowSchedule
from modular_concepts.seeds import seeded

HEIGHT, WIDTH, VECTORS = 6, 5, 2


def draws(seed, count, schedule, offset=0.0):
    """The first step's noise and noise levels, as a training with this seed draws them."""
    generator = seeded(seed, "noise")
    noise = torch.randn(count, 4, HEIGHT, WIDTH, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(count, 4, 1, 1, generator=generator)
    if isinstance(schedule, FlowSchedule):
        indices = (len(schedule) / (1 + torch.exp(-torch.randn(count, generator=generator)))).long()
    else:
        indices = torch.randint(len(schedule), (count,), generator=generator)
    return noise.double(), indices


def plain_loss(problem, adapters, rows, batch, settings):
    """The loss of a batch as a function of the adapters' factors and the word's rows.

    batch: latents (B, 4, 6, 5), token ids (B, 8) with the vectors behind the vocabulary, masks (B, 1, 6, 5), weights.
    """
    latents, ids, masks, weights = batch
    noise, indices = draws(settings.seed, len(latents), problem.base.schedule, settings.noise_offset)
    noisy, wanted, times, balance = noised(problem.base.schedule, latents, noise, indices, settings.min_snr)
    unet, text = problem.base.modules
    weight = {name: layer.weight.detach() + delta(adapters.get(name)) for name, layer in problem.layers.items()}
    table = torch.cat([text.token_embedding.weight.detach(), rows])
    context = torch.tanh(table[ids] @ weight["text_encoder.mix"].mT + text.mix.bias.detach())
    hidden = F.conv2d(noisy, weight["unet.conv"], unet.conv.bias.detach(), padding=1)
    hidden = (hidden + (times / 1000)[:, None, None, None]).flatten(2).mT
    queries = hidden @ weight["unet.to_q"].mT + unet.to_q.bias.detach()
    keys = context @ weight["unet.to_k"].mT + unet.to_k.bias.detach()
    values = context @ weight["unet.to_v"].mT + unet.to_v.bias.detach()
    attention = (queries @ keys.mT / math.sqrt(queries.shape[-1])).softmax(dim=-1)
    out = (hidden + attention @ values) @ unet.to_out.weight.detach().mT + unet.to_out.bias.detach()
    error = (out.mT.reshape(latents.shape) - wanted) ** 2
    total = 0.0
    for row in range(len(latents)):
        mean = (error[row] * masks[row]).sum() / (4 * masks[row].sum())
        total = total + weights[row] * balance[row] * mean
    if settings.attention_regularisation:
        total = total + settings.attention_regularisation * outside(attention, ids, masks, len(table) - VECTORS)
    return total


def noised(schedule, latents, noise, indices, gamma):
    """(x_t, what to predict, what the base is told, min-SNR weights) of each sample."""
    noisy, wanted, told, weights = [], [], [], []
    for row, index in enumerate(indices.tolist()):
        if isinstance(schedule, FlowSchedule):
            sigma = schedule.sigmas[index]
            noisy.append((1 - sigma) * latents[row] + sigma * noise[row])
            wanted.append(noise[row] - latents[row])
            told.append(schedule.times[index])
            weights.append(1.0)
            continue
        kept, lost = schedule.alphas_cumprod[index] ** 0.5, (1 - schedule.alphas_cumprod[index]) ** 0.5
        noisy.append(kept * latents[row] + lost * noise[row])
        flows = schedule.prediction == "v_prediction"
        wanted.append(kept * noise[row] - lost * latents[row] if flows else noise[row])
        told.append(float(index))
        ratio = (kept / lost) ** 2
        weights.append(1.0 if gamma is None else min(ratio, gamma) / (ratio + 1 if flows else ratio))
    return torch.stack(noisy), torch.stack(wanted), torch.tensor(told, dtype=torch.float64), weights


def outside(attention, ids, masks, vocabulary):
    """Mean over samples of the vectors' attention outside of the mask, relative to its maximum."""
    total, samples = 0.0, 0
    for row in range(len(ids)):
        samples += int((ids[row] >= vocabulary).any())
        for vector in range(VECTORS):
            (places,) = torch.nonzero(ids[row] == vocabulary + vector, as_tuple=True)
            if not len(places):
                continue
            map = attention[row, :, places[0]]
            off = 1 - masks[row].flatten()
            total = total + (map / map.max() * off).sum() / off.sum()
    return total / max(1, samples)


def delta(adapter):
    """scale * up down over all output rows, in the weight's shape."""
    if adapter is None:
        return 0.0
    product = adapter.alpha / adapter.rank * (adapter.lora_up @ adapter.lora_down.flatten(1))
    if adapter.rows is not None:
        whole = torch.zeros(adapter.out_features, product.shape[1], dtype=product.dtype)
        product = whole.index_copy(0, adapter.rows, product)
    return product.reshape(adapter.weight_shape)
