"""Wrong and other right answers to exercise 9."""

L, C, D = "lora.LoRALinear.forward", "lora.LoRAConv2d.forward", "lora.delta"
ADD, ADDC = "y + F.linear(F.linear(x, A), B)", "y + F.conv2d(F.conv2d(x, A, None, self.stride, self.padding), B)"
CAST = "A, B = self.lora_A.weight.to(x.dtype), self.lora_B.weight.to(x.dtype)"
SUM = 'torch.einsum("or,r...->o...", B.flatten(1).float(), A.float())'
CUT = "A, B = self.lora_A.weight.data.to(x.dtype), self.lora_B.weight.data.to(x.dtype)"
MISTAKES = [
    {"name": "base lost", "caught": "beside", "code": {L: [(ADD, "F.linear(F.linear(x, A), B)")]},
     "says": "The layer's own result is missing. With B = 0, as at the beginning of training, what would yours give?"},
    {"name": "on top of the result", "caught": "beside", "code": {L: [(ADD, "y + F.linear(F.linear(x, A), B) * y")]},
     "says": "You multiply the adaptor's result with the layer's own. What stands between W x and B A x in the formula?"},
    {"name": "always on", "caught": "switch", "code": {L: [("if not self.enabled:", "if False:")]},
     "says": "self.enabled has no effect. Where would the teacher be, if the adaptor cannot be switched off?"},
    {"name": "never on", "caught": "beside", "code": {L: [("if not self.enabled:", "if True:")]},
     "says": "Your result is always the layer's own: the adaptor is never used."},
    {"name": "upside down switch", "caught": "beside", "code": {L: [("if not self.enabled:", "if self.enabled:")]},
     "says": "The switch is upside down: the adaptor works when it is off."},
    {"name": "divided by the rank", "caught": "beside", "code": {L: [(ADD, "y + F.linear(F.linear(x, A), B) / A.shape[0]")]},
     "says": "You divide by the rank. In this project that factor is part of B already, when a file is read."},
    {"name": "no gradient", "caught": "gradients", "code": {L: [(CAST, CUT)]},
     "says": "A and B get no gradient: .data and detach() cut them off."},
    {"name": "base with gradient only", "caught": "gradients",
     "code": {L: [(ADD, "y + F.linear(F.linear(x, A).detach(), B)")]},
     "says": "A gets no gradient: something between A and the result is cut off."},
    {"name": "not cast", "caught": "half", "code": {L: [(CAST, "A, B = self.lora_A.weight, self.lora_B.weight")]},
     "says": "x is in half precision here, A and B are float32, and torch multiplies only equal types. What has the result to be?"},
    {"name": "converted for good", "caught": "half",
     "code": {L: [(CAST, "A, B = self.lora_A.to(x.dtype).weight, self.lora_B.to(x.dtype).weight")]},
     "says": "module.to() converts the module itself, tensor.to() makes a copy. What is left of a training step's change of 0.001 "
             "to a 0.5 in bfloat16?"},
    {"name": "no stride", "caught": "beside_conv", "code": {C: [("None, self.stride, self.padding", "None, 1, self.padding")]},
     "says": "Your A goes over the picture with stride 1, the layer with its own. Do the two results have the same size?"},
    {"name": "no padding", "caught": "beside_conv", "code": {C: [("None, self.stride, self.padding", "None, self.stride")]},
     "says": "Your A does not pad x, and the layer does. Do the two results have the same size?"},
    {"name": "neither stride nor padding", "caught": "beside_conv", "code": {C: [("None, self.stride, self.padding", "None")]},
     "says": "Your A goes over the picture with stride 1 and no padding; the layer has its own. Do the two results have the same "
             "size?"},
    {"name": "padding twice", "caught": "beside_conv", "code": {C: [("self.padding), B)", "self.padding), B, None, 1, self.padding)")]},
     "says": "You pad before B as well. How many pixels does a 1x1 kernel need around it?"},
    {"name": "stride and padding twice", "caught": "beside_conv",
     "code": {C: [("self.padding), B)", "self.padding), B, None, self.stride, self.padding)")]},
     "says": "Your B has the layer's stride and padding, too. After A the picture has its size already: what may a 1x1 kernel do "
             "to it?"},
    {"name": "padding guessed", "caught": "beside_conv",
     "code": {C: [("None, self.stride, self.padding", "None, self.stride, A.shape[-1] // 2")]},
     "says": "You pad by half the kernel, whatever the layer does. Who knows how much it pads?"},
    {"name": "conv base lost", "caught": "beside_conv", "code": {C: [(ADDC, ADDC[4:])]},
     "says": "The convolution's own result is missing."},
    {"name": "conv always on", "caught": "switch_conv", "code": {C: [("if not self.enabled:", "if False:")]},
     "says": "self.enabled has no effect in the convolution. Where would the teacher be?"},
    {"name": "conv not cast", "caught": "half_conv", "code": {C: [(CAST, "A, B = self.lora_A.weight, self.lora_B.weight")]},
     "says": "x is in half precision here, A and B are float32, and torch multiplies only equal types."},
    {"name": "conv converted for good", "caught": "half_conv",
     "code": {C: [(CAST, "A, B = self.lora_A.to(x.dtype).weight, self.lora_B.to(x.dtype).weight")]},
     "says": "module.to() converts the module itself, tensor.to() makes a copy. Of which type are the convolution's A and B when "
             "the next training step comes?"},
    {"name": "A @ B", "caught": "product", "code": {D: [(SUM, "A.float().flatten(1) @ B.float().flatten(1)")]},
     "says": "A (rank, in) @ B (out, rank) does not fit. Which of the two matrices meets x first, and on which side does it stand "
             "then?"},
    {"name": "A @ B for the convolution", "caught": "product",
     "code": {D: [(SUM, "B.float() @ A.float() if A.ndim == 2 else A.float().flatten(1) @ B.float().flatten(1)")]},
     "says": "For the linear layer you multiply in the right order, for the convolution the other way round. With A and B as "
             "matrices, (rank, in k k) and (out, rank), which stands on the left?"},
    {"name": "out and in exchanged in the convolution", "caught": "product",
     "code": {D: [("return " + SUM, "W = " + SUM + "\n    return W if W.ndim == 2 else W.transpose(0, 1)")]},
     "says": "For the convolution yours has the shape (in, out, k, k). Which comes first in the shape of W?"},
    {"name": "A B", "caught": "product",
     "code": {D: [(SUM, "(A.float().flatten(1).T @ B.float().flatten(1).T).reshape(-1, *B.shape[:1]) if A.ndim == 2 else " + SUM)]},
     "says": "Yours has the shape (in, out). Which of the two matrices meets x first, and on which side does it stand then?"},
    {"name": "signs lost", "caught": "product",
     "code": {D: [(SUM, 'torch.einsum("or,r...->o...", B.flatten(1).float().abs(), A.float())')]},
     "says": "The signs of B are lost."},
    {"name": "half precision product", "caught": "product", "code": {D: [(SUM, 'torch.einsum("or,r...->o...", B.flatten(1), A)')]},
     "says": "You multiply in the factors' own half precision, which rounds. Of which type is the result to be?"},
    {"name": "mean over the rank", "caught": "product", "code": {D: [(SUM, SUM + " / A.shape[0]")]},
     "says": "Yours is the mean over the rank. What is a product of matrices?"},
    {"name": "kernel mirrored", "caught": "product", "code": {D: [(SUM, SUM + ".flip(-1)")]},
     "says": "Your kernel is mirrored. torch's convolution does not flip kernels: does W's change need it?"},
]  # fmt: skip
RIGHT = [
    {"name": "matmul", "code": {
        L: [(ADD, "y + x @ A.T @ B.T")],
        D: [(SUM, "(B.float().flatten(1) @ A.float().flatten(1)).reshape(B.shape[0], *A.shape[1:])")]}},
    {"name": "one product first", "code": {L: """
def forward(self, x):
    y = F.linear(x, self.weight, self.bias)
    return y if not self.enabled else y + F.linear(x, (self.lora_B.weight @ self.lora_A.weight).to(x.dtype))
""", C: """
def forward(self, x):
    y = super().forward(x)
    if self.enabled:
        a, b = (t.weight.to(x.dtype) for t in (self.lora_A, self.lora_B))
        low = F.conv2d(x, a, stride=self.stride, padding=self.padding)
        y = y + torch.einsum("or,brhw->bohw", b[:, :, 0, 0], low)
    return y
"""}},
]  # fmt: skip
