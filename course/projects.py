"""The three projects: their rules, and the score of what a student hands in, measured in a process of its own.

A student hands in a folder with A.py, B.py or C.py. The baselines are in `course/projects/`. The noise is that of
seeds that the teacher names; processor time, evaluations of the network and the number of weights are counted.
"""

import sys
import time
import types
from pathlib import Path

RULES = {
    "A": """A small adaptor.
train(model, prompts) -> {module path: (A, B)}, in at most 10 minutes of processor time; at most 324,000 numbers.
One step with it must have edges of 0.90 or more. Score: the Fréchet distance to real pictures.""",
    "B": """Four evaluations.
sample(model, prompts, x) -> pictures, without training anything. At most four evaluations of the network for each
picture; a guided step counts as two. Score: the Fréchet distance to real pictures.""",
    "C": """A gentle edit.
edit(model, pictures, prompts, eps) -> pictures, with one evaluation of the network (its adaptors are merged). At least
95 % must be recognised as what the prompt says. Score: the DISTS distance to the pictures given.""",
}
SECONDS = {"A": 600, "B": 300, "C": 300}  # of processor time for the student's own code
PER_CLASS = 2  # pictures of each of the 74 things


def score(project, name, folder, seed):
    """Prints the rules and the score of FOLDER/<name>.py. Raises UserError."""
    from running import UserError, run_child

    path = folder / f"{name}.py"
    if not path.is_file():
        raise UserError(f"{path} is missing")
    print(f"Project {name}: {RULES[name]}\n", flush=True)
    request = {"name": name, "source": path.read_text("utf-8"), "path": str(path.resolve()), "seed": seed}
    events, failed = run_child(project, "projects.py", request, 10 * SECONDS[name])
    if not events or "figures" not in events[-1]:
        raise UserError(events[-1]["failed"] if events and "failed" in events[-1] else failed)
    for figure, value in events[-1]["figures"].items():
        print(f"{figure:<32} {value}")
    broken = events[-1]["broken"]
    print(f"\nNot valid: {'; '.join(broken)}" if broken else f"\nScore: {events[-1]['score']:.3f} (less is better)")


# ------------------------------------------------------------------------------------------------ in the child process
class Counter:
    """Counts the latents that a model's UNet is asked about."""

    def __init__(self, model):
        self.count = 0
        model.unet.register_forward_pre_hook(self.add)

    def add(self, module, inputs):
        self.count += len(inputs[0])


class Clock:
    """Runs a student's function under a limit of processor time for all its calls together."""

    def __init__(self, seconds):
        self.left = seconds

    def __call__(self, function, *args):
        from checks import TimeLimit

        start = time.process_time()
        with TimeLimit(self.left):
            result = function(*args)
        self.left -= time.process_time() - start
        return result


def measure_a(m, answer, clock, seed):
    import torch

    import train
    from lora import merge

    model = m.load("emoji")
    with torch.enable_grad():
        loras = clock(answer.train, model, train.find_prompts("emoji"))
    count = sum(A.numel() + B.numel() for A, B in loras.values())
    adapted = m.load("emoji")
    merge(adapted.unet, {path: (A.detach(), B.detach()) for path, (A, B) in loras.items()})
    recognised, frechet, edges = measure(adapted, lambda prompts, x: one_step(m, adapted, prompts, x), seed)
    broken = [f"{count:,} numbers are more than 324,000"] if count > 324_000 else []
    broken += [f"edges of {edges:.2f} are below 0.90"] if edges < 0.9 else []
    figures = {"numbers": f"{count:,}", "recognised": f"{recognised:.1f} %", "edges": f"{edges:.2f}"}
    return figures | {"Fréchet": f"{frechet:.3f}"}, frechet, broken


def one_step(m, model, prompts, x):
    return model.decode(m.student(model, prompts, x, model.schedule.num_train_timesteps - 1))


def measure_b(m, answer, clock, seed):
    import torch

    model = m.load("emoji")
    before = [p.clone() for p in model.unet.parameters()]
    counter, count = Counter(model), 0

    def sample(prompts, x):
        nonlocal count
        count += len(x)
        return clock(answer.sample, model, prompts, x)

    recognised, frechet, edges = measure(model, sample, seed)
    each = counter.count / count
    broken = [f"{each:g} evaluations are more than 4"] if each > 4 else []
    if not all(torch.equal(p, q) for p, q in zip(before, model.unet.parameters())):
        broken.append("the network's weights have changed")
    figures = {"evaluations a picture": f"{each:g}", "recognised": f"{recognised:.1f} %", "edges": f"{edges:.2f}"}
    return figures | {"Fréchet": f"{frechet:.3f}"}, frechet, broken


def measure_c(m, answer, clock, seed):
    import torch

    from evaluate import Evaluation, real_pictures
    from sample import apply_lora, to_pil, to_tensor
    from train import load_distance

    model = m.load("emoji")
    folder = m.find_checkpoint("emoji")
    apply_lora(model, folder / "pytorch_lora_weights.safetensors")
    evaluation, counter = Evaluation(model, 1), Counter(model)
    (_, _), (pictures, labels) = real_pictures(evaluation.glyphs)
    count = len(evaluation.glyphs)
    sources = pictures.unflatten(0, (count, -1))[:, 0]
    targets = (torch.arange(count) + count // 2) % count  # each thing becomes another
    prompts = [evaluation.glyphs[k][1][0] for k in targets]
    eps = m.noise([1_000_000 * (seed + 1) + k for k in range(count)], 4, 16, 16)
    edited = []
    for i in range(0, count, 16):
        part = slice(i, i + 16)
        edited.append(clock(answer.edit, model, sources[part], prompts[part], eps[part]))
    edited = torch.stack([to_tensor(picture) for picture in to_pil(torch.cat(edited))])
    recognised = 100 * (evaluation.net(edited).argmax(1) == targets).float().mean().item()
    distance = load_distance("dists", folder)
    parts = zip(edited.split(16), sources.split(16))
    far = torch.cat([distance(a / 2 + 0.5, b / 2 + 0.5) for a, b in parts]).mean().item()
    each = counter.count / count
    broken = [f"{each:g} evaluations are more than 1"] if each > 1 else []
    broken += [f"{recognised:.1f} % recognised are below 95 %"] if recognised < 95 else []
    figures = {"evaluations a picture": f"{each:g}", "recognised": f"{recognised:.1f} %"}
    return figures | {"DISTS to the source": f"{far:.3f}"}, far, broken


def measure(model, make, seed):
    """make(prompts, x) -> recognition in %, Fréchet distance and energy at edges of its pictures of all things."""
    import torch

    import hipa
    from evaluate import Evaluation

    evaluation = Evaluation(model, PER_CLASS)
    labels = torch.arange(len(evaluation.glyphs)).repeat_interleave(PER_CLASS)
    prompts = [evaluation.glyphs[k][1][0] for k in labels]
    x = hipa.noise([1_000_000 * (seed + 1) + k for k in range(len(labels))], 4, 16, 16)
    pictures = torch.cat([make(prompts[i : i + 24], x[i : i + 24]) for i in range(0, len(labels), 24)])
    return evaluation.measure(pictures, labels)[:3]


def main():
    from child import begin, place_of

    tell, request = begin()
    import torch

    import hipa
    from checks import TooLong

    answer = types.ModuleType("handed_in")
    try:
        exec(compile(request["source"], request["path"], "exec"), answer.__dict__)
        clock = Clock(SECONDS[request["name"]])
        work = {"A": measure_a, "B": measure_b, "C": measure_c}[request["name"]]
        with torch.no_grad():
            figures, value, broken = work(hipa, answer, clock, request["seed"])
        used = SECONDS[request["name"]] - clock.left
        tell(figures=figures | {"processor time": f"{used:.0f} s"}, score=value, broken=broken)
    except TooLong:
        tell(failed=f"stopped after {SECONDS[request['name']]} seconds of processor time")
    except BaseException as error:
        tell(failed=f"{type(error).__name__}: {error}{place_of(error, {request['path']})}".replace("\n", "; "))


if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "emoji")]
    main()
