import sys, torch, time
import videoattn
from videoattn.benchmarks import forward, models, timing
from videoattn.policy import Dense, Policy
device = torch.device("cuda")
name, size = sys.argv[1], tuple(map(int, sys.argv[2].split("x")))
plain = models.denoiser(name, device=device)
outs, fast = {}, {}
fast["exact"] = videoattn.enable_fast_attention(forward.twin(plain), "exact")
for b in sys.argv[3:]:
    p = b.replace("triton_hopper_int8_", "int8_qk_").replace("triton_int8_", "int8_qk_") + "_pv"
    fast[b] = videoattn.enable_fast_attention(forward.twin(plain), Policy(decision=Dense(p)), backend=b)
def run(d):
    @torch.no_grad()
    def f(kwargs): return d(**kwargs)[0]
    return f
inputs = lambda seed: (models.inputs(name, *size, device=device, overrides=None, seed=seed),)
t = time.time()
args = inputs(0)
for who, d in {"plain": plain, **fast}.items():
    run(d)(*args)
    print(who, "peak GiB", forward.peak(lambda d=d: run(d)(*args), device) / 2**30, flush=True)
res = timing.compare(run(plain), {k: run(v) for k, v in fast.items()}, inputs, forward.check(0.5), device=device, seconds=3, min_rounds=3, full_queue=False)
for k, r in res.items(): print(r)
for d in fast.values(): print(videoattn.report(d))
print("e2e", time.time() - t)
