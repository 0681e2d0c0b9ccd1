//! The control plane of ringway.
