"""Whether a run fits, how fast it can be and what it costs, before it is paid for.

__main__       Will it fit, how fast at best, what will it cost. Compiles the true training step,
               and the loop that
analytic       A rough answer in a second, by arithmetic: memory by part, bytes on the network. It
               says so.
compile        Compiles the true training step, and the decode loop, for a machine that is not here.
compile_cache  Answers of the compiler, kept in a folder: a program is compiled once, whoever asks,
               and resumed.
hlo_analysis   Reads a compiled program's text: which collectives, how often, how many bytes;
               cycles.
search         The best (data, fsdp, tp), batch and remat of a machine: arithmetic sorts, compiling
               decides.
table          The table of docs/plan_7b.md: models x machines x lengths, each with its best mesh,
               batch and remat.
topology       Machines by name, and their devices for the compiler: no TPU is needed to compile
               for one.
"""
