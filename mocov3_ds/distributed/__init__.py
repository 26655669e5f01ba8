"""The only rooms that know other ranks exist: `ranks` (torch.distributed), `engine` and `zero`."""
