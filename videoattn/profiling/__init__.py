"""What a generation costs, operator by operator.

    profile.py     the result: what was measured, as frozen facts; written and read as JSON
    categories.py  what an operator counts as: closed lists, and the stages that count as a whole
    scopes.py      which module of the pipeline is running: hooks, and what listens to them
    trace.py       an exported trace of torch.profiler -> the time of each module and operator
    costs.py       what one operator costs by its shapes: FLOPs, bytes, elements
    alive.py       what operators made and what of it lives
    counts.py      FLOPs, bytes and attention shapes: a pass of its own, also on fake tensors
    memory.py      what is allocated when, and what is alive at the peak
    ceilings.py    what the machine can do: its matrix products and copies, measured
    io_model.py    the bytes that attention must move, and those that a tiling moves
    recorder.py    the passes over a pipeline, in order -> Profile
    summary.py     shares, roofline, Amdahl: everything that follows from a Profile
    comparison.py  the result of before and after, as frozen facts and JSON
    alternating.py two states of a pipeline in turns, and what their times show
    frames.py      frames as they are measured and shown
    compare.py     before and after, with quality -> Comparison
    cards.py       ceilings of cards that are not here
    described.py   what a model's configs say, without its weights
    rehearsal.py   every part of a pipeline once on the meta device
    plan.py        the same figures of a model's config alone -> Plan; plan_text.py is its form
    folder.py      a report on disk, and back
    text.py, markdown.py, html.py, perfetto.py   forms; drawn.py and page/ are the HTML's

Data goes one way, from the top of this list to its end.
"""
