//! containerd snapshot semantics and the Prepare plan, over values.
