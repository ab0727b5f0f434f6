"""One rank of a tensor-parallel model of transformers: `python parallel_child.py DIR PROMPT RESULT [PLAN]`.

PROMPT: a JSON list of token ids; PLAN: a JSON object, or "auto". Rank 0 writes RESULT, a JSON object with the logits of
all positions, the shapes of every layer's tensors on the ranks, and greedy tokens; it also saves the model beside it.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any


def main(directory: str, prompt: str, result: str, plan: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import marlin  # noqa: F401
    from marlin.integrations.transformers.parallel import local
    from marlin.nn import sparse_linears

    torch.set_num_threads(1)
    config = DistributedConfig(tp_plan=plan, tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config).eval()
    ids = torch.tensor([json.loads(prompt)])
    with torch.inference_mode():
        logits = model(ids).logits[0]
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    shapes = {name: list(local(layer.codes).shape) for name, layer in sparse_linears(model)}
    model.save_pretrained(pathlib.Path(result).parent / "saved")
    try:
        model.dequantize()
        refused = ""
    except Exception as error:
        refused = str(error)
    if torch.distributed.get_rank() == 0:
        found = {"logits": logits.tolist(), "tokens": tokens.tolist(), "shapes": shapes, "refused": refused}
        pathlib.Path(result).write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    plan = sys.argv[4] if len(sys.argv) > 4 else "auto"
    main(*sys.argv[1:4], plan if plan == "auto" else json.loads(plan))
