"""Many workers: who we are (`launch`), how we meet (`rendezvous`), what we share (`group`), who watches (`watch`)."""
