"""SigLino in plain PyTorch, one image and one token at a time, from its own arguments and state dict."""

import torch
import torch.nn.functional as F


def attention(x_TD, args, get, position_T2):
    """(T, D) -> (T, D): RMS norms, rotation of the second halves of heads, softmax times the sink's sigmoid."""
    H, d = args["n_heads"], args["head_dim"] or args["dim"] // args["n_heads"]
    KV = args["n_kv_heads"] or H
    q, k, v = (
        (x_TD @ get(f"attention.w{name}.weight").T).unflatten(-1, (heads, d)).transpose(0, 1)
        for name, heads in (("q", H), ("k", KV), ("v", KV))
    )
    if args["use_qk_norm"]:
        q, k = F.rms_norm(q, (d,)), F.rms_norm(k, (d,))
    outputs = []
    for head in range(H):
        angle_TF = position_T2 @ get("freqs_cis_golden", False)[head].T
        turn_TF = torch.polar(torch.ones_like(angle_TF), angle_TF)
        query, key = q[head], k[head * KV // H]
        query, key = (
            torch.cat([half, torch.view_as_real(torch.view_as_complex(pairs) * turn_TF).flatten(-2)], dim=-1)
            for half, pairs in ((each[:, : d // 2], each[:, d // 2 :].reshape(-1, d // 4, 2)) for each in (query, key))
        )
        scores_TT = query @ key.T / d**0.5
        sink_T = torch.sigmoid(scores_TT.logsumexp(-1) - get("attention.sinks")[head])
        outputs.append(scores_TT.softmax(-1) @ v[head * KV // H] * sink_T[:, None])
    return torch.cat(outputs, dim=-1) @ get("attention.wo.weight").T


def mlp(x_TD, w1, w2, w3, activation):
    """w2 (act(w1 x) * w3 x)."""
    gate = x_TD @ w1.T
    return ((F.silu(gate) if activation == "silu" else 2 * gate.relu() ** 2) * (x_TD @ w3.T)) @ w2.T


def experts(x_TD, args, get):
    """(T, D) -> (T, D), each token through its experts by itself, and the chosen experts (T, K)."""
    scores_TE = x_TD @ get("moe.router.gate.weight").T
    scores_TE = scores_TE.sigmoid() if args["score_func"] == "sigmoid" else scores_TE.softmax(-1)
    index_TK = (scores_TE + get("moe.expert_bias")).topk(args["top_k"], dim=-1).indices
    weight_TK = scores_TE.gather(-1, index_TK)
    if args["route_norm"]:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    weights = [get(f"moe.experts.w{number}") for number in (1, 2, 3)]
    y_TD = torch.stack(
        [
            sum(
                args["route_scale"] * weight * mlp(x_D[None], *(w[e] for w in weights), args["activation"])[0]
                for e, weight in zip(index_K.tolist(), weight_K)
            )
            for x_D, index_K, weight_K in zip(x_TD, index_TK, weight_TK)
        ]
    )
    if args["num_shared_experts"]:
        shared = [get(f"moe.shared_experts.w{number}.weight") for number in (1, 2, 3)]
        y_TD = y_TD + mlp(x_TD, *shared, args["activation"])
    return y_TD, index_TK


def tokens(patches_Px, shape, args, state):
    """One image's patches -> (T, D) after the last norm, and the chosen experts of each sparse layer."""
    H, W = shape
    down, across = (torch.linspace(-1, 1, n) if n > 1 else -torch.ones(1) for n in (H, W))
    position_P2 = torch.cartesian_prod(down * (H / W) ** 0.5, across * (W / H) ** 0.5)
    prefix = [state["cls_token"][0], *([state["storage_tokens"][0]] if args["n_storage_tokens"] else [])]
    x_TD = torch.cat([*prefix, patches_Px @ state["img_projector.weight"].T])
    position_T2 = torch.cat([torch.zeros(len(x_TD) - len(position_P2), 2), position_P2])
    chosen = []
    for layer in range(args["n_layers"]):

        def get(name, in_layer=True, layer=layer):
            return state[f"layers.{layer}.{name}" if in_layer else name]

        def norm(x_TD, name, get=get):
            if args["parameterized_norm"]:
                return F.rms_norm(x_TD, x_TD.shape[-1:], get(name), args["norm_eps"])
            return F.rms_norm(x_TD, x_TD.shape[-1:])

        x_TD = x_TD + attention(norm(x_TD, "attention_norm.weight"), args, get, position_T2)
        h_TD = norm(x_TD, "ffn_norm.weight")
        if layer < args["first_n_layers_dense"]:
            weights = [get(f"feed_forward.w{number}.weight") for number in (1, 2, 3)]
            x_TD = x_TD + mlp(h_TD, *weights, args["activation"])
        else:
            y_TD, index_TK = experts(h_TD, args["moe_args"], get)
            x_TD, chosen = x_TD + y_TD, [*chosen, index_TK]
    return F.rms_norm(x_TD, x_TD.shape[-1:], state["norm.weight"], args["norm_eps"]), chosen
