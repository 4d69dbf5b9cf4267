# SPDX-License-Identifier: Apache-2.0
"""Ideas for a better carving, tried on single layers: the rows of the results that are not built.

    python examples/compare_layers.py MODEL CALIBRATION_TEXT --layer 4 --layer 10 --layer 22

The FFN inputs of some layers of the dense model, its own FFN's output as what is wanted, and the
refit with its ridge chosen on held-out tokens, the last eighth of the windows. One JSON object per
layer, share of the neurons and idea goes to standard output: `error` is the relative error of the
output on those tokens.

* static: the most energetic neurons, nothing routed;
* routed: as the recipe `refined`; beside it an oracle that knows the energies, and
  both with a threshold for all tokens, of equal mean, instead of the K best of each;
* path: as static or routed, with fewer neurons and a linear map of rank r from the FFN's input that
  adds what idle neurons would have written, of equal size;
* reassigned: as the recipe does it, neurons go to the expert for whose tokens, under the router
  there is, they write most; then a new router; eight rounds;
* signs: clusters of neurons whose gates have the same sign.
"""

import argparse
import json
from collections.abc import Iterator

import torch
from transformers.activations import ACT2FN

from cmoe_hf.conversion.carve.layer import FFN
from cmoe_hf.conversion.carve.linalg import lower_gram, solve_shifted
from cmoe_hf.conversion.carve.partition import (
    Partition,
    partition_by_contributions,
    reassigned,
    split_by_score,
)
from cmoe_hf.conversion.carve.profile import energies
from cmoe_hf.conversion.carve.refit import Reconstruction, Samples, reconstruct
from cmoe_hf.conversion.carve.router import linear_router, output_energies, ranking_router
from cmoe_hf.conversion.source.calibration import apart_windows, held_out
from cmoe_hf.conversion.source.loading import load_model

PATH_RIDGE = 0.3


class Layer:
    """One dense FFN, its inputs on calibration tokens, and what is computed of them once."""

    def __init__(
        self, mlp: torch.nn.Module, x_TH: torch.Tensor, act: str, held: int, experts: int
    ) -> None:
        gate_FH, up_FH, down_HF = (
            part.weight.detach().float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.ffn = FFN(gate_FH, up_FH, down_HF, ACT2FN[act], torch.float32)
        self.x_TH, self.held, self.cut = x_TH, held, len(x_TH) - held
        self.experts = experts
        self.h_TF = self.ffn.hidden(x_TH)
        self.wanted_TH = self.h_TF @ down_HF.T
        self.score_F = energies(self.h_TF[: self.cut], down_HF)

    def error(self, parts: Partition, run_TN: torch.Tensor) -> float:
        """Of the refit on held-out tokens."""
        return self.fit(parts, run_TN, self.wanted_TH).held_out_error

    def fit(
        self, parts: Partition, run_TN: torch.Tensor, target_TH: torch.Tensor
    ) -> Reconstruction:
        """The refit towards an output."""
        weight_T = torch.ones(len(self.x_TH))
        samples = Samples(self.x_TH, target_TH, weight_T, self.held)
        return reconstruct(self.ffn, parts, run_TN, samples)

    def static(self, neurons: int) -> tuple[Partition, torch.Tensor]:
        """The best neurons always run; one expert of all others never does."""
        _, shared_S, idle_R = split_by_score(self.score_F, neurons)
        return Partition(shared_S, idle_R.unsqueeze(0), None, 0), self.x_TH.new_zeros(
            len(self.x_TH), 1
        ).bool()

    def routed(self, running: int, shared_of_them: float) -> tuple[Partition, int]:
        """The recipe's first partition, and how many experts are active."""
        active = max(1, round(running * (1 - shared_of_them)))
        shared = (running - active) * self.ffn.width // self.experts
        parts = partition_by_contributions(
            self.h_TF[: self.cut],
            self.ffn.down_HF,
            self.score_F,
            shared=shared,
            experts=self.experts - running + active,
        )
        return parts, active

    def scores(self, parts: Partition, active: int) -> torch.Tensor:
        """Those of the recipe's router, learnt on the tokens seen, (T, N)."""
        x_TH, h_TF = self.x_TH[: self.cut], self.h_TF[: self.cut]
        energy_TN = output_energies(h_TF, self.ffn.down_HF, parts.experts_NM)
        start_NH = linear_router(x_TH, energy_TN, ridge=0.5)["linear_weight"]
        router = ranking_router(x_TH, energy_TN, start_NH, top_k=active)
        return self.x_TH @ router["linear_weight"].T

    def path_error(self, parts: Partition, run_TN: torch.Tensor, rank: int) -> float:
        """With a linear map of low rank beside the running neurons: refit and map in turns."""
        running = torch.cat([parts.shared_S, parts.experts_NM.flatten()])
        mask_TF = torch.ones_like(self.h_TF, dtype=torch.bool)
        width = parts.experts_NM.shape[1]
        mask_TF[:, parts.experts_NM.flatten()] = run_TN.repeat_interleave(width, dim=1)
        assert len(running) == self.ffn.width
        z_TF, x_TH = self.h_TF * mask_TF, self.x_TH
        path_TH, wanted_TH, cut = torch.zeros_like(self.wanted_TH), self.wanted_TH, self.cut
        gram_HH = lower_gram(x_TH[:cut])
        shift = PATH_RIDGE * gram_HH.diagonal().mean().item()
        for _ in range(2):
            found = self.fit(parts, run_TN, wanted_TH - path_TH)
            missing_TH = wanted_TH - z_TF @ found.down_HG.T
            map_HH = solve_shifted(gram_HH, x_TH[:cut].T @ missing_TH[:cut], shift)
            _, _, right_HH = torch.linalg.svd(x_TH[:cut] @ map_HH, full_matrices=False)
            path_TH = x_TH @ (map_HH @ right_HH[:rank].T @ right_HH[:rank])
        found = self.fit(parts, run_TN, wanted_TH - path_TH)
        # Its errors are relative to the target without the path.
        held_TH, left_TH = wanted_TH[cut:], (wanted_TH - path_TH)[cut:]
        return found.held_out_error * (left_TH.norm() / held_TH.norm()).item()

    def reassigned(self, parts: Partition, active: int, rounds: int = 8) -> Partition:
        """Clusters for the router that there is."""
        x_TH, h_TF = self.x_TH[: self.cut], self.h_TF[: self.cut]
        for _ in range(rounds):
            energy_TN = output_energies(h_TF, self.ffn.down_HF, parts.experts_NM)
            router_NH = linear_router(x_TH, energy_TN, ridge=0.5)["linear_weight"]
            run_TN = best(x_TH @ router_NH.T, active)
            parts = reassigned(parts, h_TF, self.ffn.down_HF, run_TN)
        return parts

    def by_signs(self, parts: Partition) -> Partition:
        """The same routed neurons, clustered by the signs of their gates."""
        assert self.ffn.gate_FH is not None
        sign_TF = (self.x_TH[: self.cut] @ self.ffn.gate_FH.T).sign()
        routed_R = parts.experts_NM.flatten().sort().values
        inner = partition_by_contributions(
            sign_TF[:, routed_R] + 1,
            torch.ones(1, len(routed_R)),
            self.score_F[routed_R],
            shared=0,
            experts=len(parts.experts_NM),
        )
        return parts._replace(experts_NM=routed_R[inner.experts_NM])


def best(score_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """True for the K best of each token."""
    run_TN = torch.zeros_like(score_TN, dtype=torch.bool)
    return run_TN.scatter_(1, score_TN.topk(top_k, dim=1).indices, True)


def above(score_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """True above one threshold for all tokens that K experts pass on average."""
    count = len(score_TN) * top_k
    return score_TN > score_TN.flatten().topk(count + 1).values[-1]


def rows(layer: Layer, share: float, shared: float) -> Iterator[tuple[str, float]]:
    """Each idea and its error."""
    width, hidden = layer.ffn.width, layer.x_TH.shape[1]
    running = round(share * layer.experts)
    neurons, path_cost = running * width // layer.experts, 2 * hidden / (3 * hidden)
    yield "static", layer.error(*layer.static(neurons))
    for rank in (32, 64):
        fewer = neurons - round(rank * path_cost)
        yield f"static, path of rank {rank}", layer.path_error(*layer.static(fewer), rank)
    parts, active = layer.routed(running, shared)
    score_TN = layer.scores(parts, active)
    energy_TN = output_energies(layer.h_TF, layer.ffn.down_HF, parts.experts_NM)
    yield "routed", layer.error(parts, best(score_TN, active))
    yield "routed, threshold", layer.error(parts, above(score_TN, active))
    yield "oracle", layer.error(parts, best(energy_TN, active))
    yield "oracle, threshold", layer.error(parts, above(energy_TN, active))
    for rank in (32, 64):  # paid in whole experts, so rank 32 for nothing
        saved = round(rank * path_cost * layer.experts / width)
        fewer_parts, fewer_active = layer.routed(running - saved, shared)
        run_TN = best(layer.scores(fewer_parts, fewer_active), fewer_active)
        yield f"routed, path of rank {rank}", layer.path_error(fewer_parts, run_TN, rank)
    for name, other in (
        ("reassigned", layer.reassigned(parts, active)),
        ("signs", layer.by_signs(parts)),
    ):
        yield f"routed, {name}", layer.error(other, best(layer.scores(other, active), active))
        energy_TN = output_energies(layer.h_TF, layer.ffn.down_HF, other.experts_NM)
        yield f"oracle, {name}", layer.error(other, best(energy_TN, active))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--layer", type=int, action="append", help="repeatable")
    parser.add_argument("--share", type=float, action="append", help="of the neurons; repeatable")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--shared", type=float, default=0.75, help="of the neurons that run")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, "float32", torch.device("cpu"), False)
    with open(arguments.calibration, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt").input_ids[0]
    samples, length = arguments.samples, arguments.sequence_length
    windows_WL = apart_windows(ids, samples=samples, length=length, seed=0)
    chosen, inputs = arguments.layer or [4, 10, 22], {}
    blocks = {index: model.base_model.layers[index].mlp for index in chosen}
    for index, mlp in blocks.items():
        inputs[index] = []
        mlp.register_forward_pre_hook(lambda _, args, i=index: inputs[i].append(args[0][0]))
    for window_L in windows_WL:
        model.base_model(window_L.unsqueeze(0))
    for index, mlp in blocks.items():
        act, held = model.config.hidden_act, held_out(samples, length)
        layer = Layer(mlp, torch.cat(inputs.pop(index)), act, held, arguments.experts)
        for share in arguments.share or [0.25, 0.5, 0.75]:
            for idea, error in rows(layer, share, arguments.shared):
                found = {"layer": index, "share": share, "idea": idea, "error": round(error, 4)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
