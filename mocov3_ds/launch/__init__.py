"""How does a run start on a cluster: files for Slurm, Kubernetes, pdsh, torchrun, accelerate."""
