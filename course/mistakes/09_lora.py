"""Wrong and other right answers to exercise 9."""

L, T, N, D, M = "lora.LoRALinear.forward", "lora.Adapted.adapt", "lora.add_lora", "lora.delta", "lora.merge"
ADD = "y + F.linear(F.linear(x, A), B)"
CAST = "A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)"
SUM = 'torch.einsum("or,r...->o...", B.flatten(1).float(), A.float())'
CUT = "A, B = self.lora_A.weight.data.to(x.dtype), self.lora_B.weight.data.to(x.dtype)"
INIT, ZERO = "nn.init.kaiming_uniform_(A.weight, a=5**0.5)", "nn.init.zeros_(B.weight)"
ENDS, BACK = "path.endswith(targets)", "return [factor for pair in factors(net).values() for factor in pair]"
CLASS = "module.__class__ = kinds[type(module)]"
TOTAL = "base[path].float() + weight * delta(A, B).to(base[path].device)"
REFUSE = '        if base[path].shape != shape or A.shape[0] != B.shape[1]:\n            raise ValueError(f"the adaptors are for another network: {path} is {shape} there")\n'
MISTAKES = [
    {"name": "base lost", "caught": "beside", "code": {L: [(ADD, "F.linear(F.linear(x, A), B)")]},
     "says": "The layer's own result is missing. With B = 0, as at the beginning of training, what would yours give?"},
    {"name": "always on", "caught": "switch", "code": {L: [("if not self.enabled:", "if False:")]},
     "says": "self.enabled has no effect. Where would the teacher be, if the adaptor cannot be switched off?"},
    {"name": "divided by the rank", "caught": "beside", "code": {L: [(ADD, "y + F.linear(F.linear(x, A), B) / A.shape[0]")]},
     "says": "You divide by the rank. In this project that factor is part of B already, when a file is read."},
    {"name": "not cast", "caught": "half", "code": {L: [(CAST, "A, B = self.lora_A.weight, self.lora_B.weight")]},
     "says": "x is in half precision here, A and B are float32, and torch multiplies only equal types. What has the result to be?"},
    {"name": "A @ B", "caught": "product", "code": {D: [(SUM, "A.float().flatten(1) @ B.float().flatten(1)")]},
     "says": "A (rank, in) @ B (out, rank) does not fit. Which of the two matrices meets x first, and on which side does it stand then?"},
    {"name": "A @ B for the convolution", "caught": "product", "code": {D: [(SUM, "B.float() @ A.float() if A.ndim == 2 else A.float().flatten(1) @ B.float().flatten(1)")]},
     "says": "For the linear layer your order is right, for the convolution it is not. With A and B as matrices, which stands on the left?"},
    {"name": "A B", "caught": "product", "code": {D: [(SUM, "(A.float().flatten(1).T @ B.float().flatten(1).T).reshape(-1, *B.shape[:1]) if A.ndim == 2 else " + SUM)]},
     "says": "Yours has the shape (in, out). Which of the two matrices meets x first, and on which side does it stand then?"},
    {"name": "A is 0", "caught": "begin", "code": {T: [(INIT, "nn.init.zeros_(A.weight)")]},
     "says": "A and B are both 0. The gradient of each is a product with the other: when will they grow?"},
    {"name": "not frozen", "caught": "frozen", "code": {N: [("    net.requires_grad_(False)\n", "")]},
     "says": "The base weights are still trained. What must the teacher never do?"},
    {"name": "all frozen", "caught": "frozen", "code": {N: [(BACK, "net.requires_grad_(False)\n    " + BACK)]},
     "says": "You freeze the net after the adaptors are in it: nothing is left to be trained."},
    {"name": "targets anywhere", "caught": "which", "code": {N: [(ENDS, "any(target in path for target in targets)")]},
     "says": "You adapt layers whose path CONTAINS a target, such as to_q2. Where in the path has it to stand?"},
    {"name": "subclasses too", "caught": "which", "code": {N: [("type(module) in kinds", "isinstance(module, tuple(kinds))"), (CLASS, "module.__class__ = LoRALinear if isinstance(module, nn.Linear) else LoRAConv2d")]},
     "says": "isinstance finds subclasses too; with another __class__ they lose what makes them what they are."},
    {"name": "while it grows", "caught": "which", "code": {N: [("list(net.named_modules())", "net.named_modules()")]},
     "says": "You add layers while named_modules() still walks through the net: it comes to your A and B, and adapts them too, without end."},
    {"name": "other objects", "caught": "frozen", "code": {N: [(CLASS, "old, module = module, object.__new__(kinds[type(module)])\n            module.__dict__ = {**old.__dict__, '_modules': {}}\n            setattr(net.get_submodule(path.rpartition('.')[0]), path.rpartition('.')[2], module)")]},
     "says": "You put new layers in the places of the old ones. Whoever holds an old layer, such as an optimizer, will miss yours: how can an object change its class?"},
    {"name": "in place", "caught": "added", "code": {M: [("base[path].data = total.to(base[path].dtype)", "base[path].data.copy_(total)")]},
     "says": "You write into the old tensor. load() maps the checkpoint's file into memory: whose memory is it?"},
    {"name": "rounded twice", "caught": "added", "code": {M: [(TOTAL, "base[path] + (weight * delta(A, B)).to(base[path])")]},
     "says": "You round the change to half precision, and the sum again. In which type are both to be added?"},
    {"name": "nothing refused", "caught": "refused", "code": {M: [(REFUSE, "        pass\n")]},
     "says": "Adaptors of another shape are not refused. Torch stretches a 1 silently: what would the network then be?"},
    {"name": "refused too late", "caught": "refused", "code": {M: [(REFUSE, "        pass\n"), ("        # Rounded", "        if base[path].shape != (*B.shape[:1], *A.shape[1:]) or A.shape[0] != B.shape[1]:\n            raise ValueError(path)\n        # Rounded")]},
     "says": "You look at each pair just before you add it. What has been changed by the time that the last one does not fit?"},
    {"name": "rank not compared", "caught": "refused", "code": {M: [(" or A.shape[0] != B.shape[1]", "")]},
     "says": "A and B of different ranks are not refused. Which two of their sides have to be equal?"},
]  # fmt: skip
RIGHT = [
    {"name": "matmul", "code": {
        L: [(ADD, "y + x @ A.T @ B.T")],
        D: [(SUM, "(B.float().flatten(1) @ A.float().flatten(1)).reshape(B.shape[0], *A.shape[1:])")]}},
    {"name": "one product first", "code": {L: """
def forward(self, x):
    y = F.linear(x, self.weight, self.bias)
    return y if not self.enabled else y + F.linear(x, (self.lora_B.weight @ self.lora_A.weight).to(x.dtype))
""", T: """
def adapt(self, A, B):
    n = A.weight[0].numel()
    with torch.no_grad():
        A.weight.copy_((2 * torch.rand(A.weight.shape) - 1) / n**0.5)
        B.weight.mul_(0)
    self.lora_A, self.lora_B, self.enabled = A.float().to(self.weight.device), B.float().to(self.weight.device), True
""", N: """
def add_lora(net, rank=16, targets=ATTENTION):
    for p in net.parameters():
        p.requires_grad = False
    found = [v for k, v in net.named_modules() if targets == "all" or any(k.endswith(t) for t in targets)]
    found = [v for v in found if type(v) is nn.Linear or type(v) is nn.Conv2d]
    for v in found:
        v.__class__ = LoRALinear if type(v) is nn.Linear else LoRAConv2d
        v.add(rank)
    return [p for v in found for p in (v.lora_A.weight, v.lora_B.weight)]
""", M: """
def merge(net, loras, weight=1.0):
    news = {}
    for path, (A, B) in loras.items():
        W = net.get_submodule(path).weight.detach()
        if A.shape[0] != B.shape[1] or W.shape[0] != B.shape[0] or W.shape[1:] != A.shape[1:]:
            raise ValueError(path)
        news[path] = (W.float() + delta(A, B).to(W.device) * weight).to(W.dtype)
    for path, W in news.items():
        net.get_submodule(path).weight.data = W
"""}},
]  # fmt: skip
EQUIVALENT = {"total = base[path] + weight": "half precision plus float32 is float32"}
