//! What is on the wire and in front of it: virtio-net header, feature bits, offloads, fields of
//! packet headers, checksums. Knows of no port, ring or burst.

pub(crate) mod checksum;
mod features;
pub(crate) mod fields;
pub(crate) mod net_header;
mod offloads;
mod pseudo_header;
pub(crate) mod rarp;

pub(crate) use features::{Features, ProtocolFeatures};
pub(crate) use offloads::Offloads;
pub(crate) use pseudo_header::{find_open_checksum, pseudo_sum};
