"""What a machine has and how fast it is (doctor.py): findings.py is how it is said, system.py disks, memory, limits and versions,
accelerators.py GPUs, what runs on them, and two processes that talk, whose rate a plan then takes."""
