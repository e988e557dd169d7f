"""Will a run fit, how fast can it be, what does it cost: before anything is paid for."""
