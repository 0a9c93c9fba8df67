//! Test helpers: layer generator, registry and token server, fault scripts, models.
