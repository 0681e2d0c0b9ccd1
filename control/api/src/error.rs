//! Error kinds and their JSON-RPC codes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::refusal::SwitchError;

/// The enum of kinds, and the list of all.
macro_rules! kinds {
    ($(#[$about:meta])* enum $name:ident { $($(#[$doc:meta])* $kind:ident = $code:literal,)* }) => {
        $(#[$about])*
        pub enum $name { $($(#[$doc])* $kind = $code,)* }

        impl $name {
            /// Every kind, in declaration order.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The kind as `error.code` (JSON-RPC 2.0, 5.1).
            pub const fn code(self) -> i32 {
                self as i32
            }
        }
    };
}

kinds! {
    /// What went wrong: the stable name of an error, in `error.data.kind`. The codes of the first
    /// five are JSON-RPC's own; all others are in -32099 to -32000, which JSON-RPC leaves to
    /// servers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum ErrorKind {
        /// The line is no JSON.
        ParseError = -32700,
        /// The JSON is no JSON-RPC 2.0 request.
        InvalidRequest = -32600,
        /// There is no such method.
        MethodNotFound = -32601,
        /// The parameters are not those of the method.
        InvalidParams = -32602,
        /// The daemon failed in a way that it does not understand.
        InternalError = -32603,
        /// The name is taken.
        PortExists = -32001,
        /// There is no port of that name.
        NoSuchPort = -32002,
        /// The port has no such queue pair.
        NoSuchQueue = -32006,
        /// All slots are taken.
        TooManyPorts = -32003,
        /// The path of a vhost-user socket can't be used.
        SocketPath = -32004,
        /// The tap can't be created or attached.
        Tap = -32005,
        /// The interface can't be used through AF_XDP.
        AfXdp = -32007,
        /// The forwarding database has no such entry.
        NoSuchFdbEntry = -32010,
        /// The forwarding database can't take the entry.
        FdbRefused = -32011,
        /// The address is in several VLANs.
        SeveralVlans = -32012,
        /// The port is not in the VLAN, or it is not said which of its VLANs is meant.
        VlanOfPort = -32013,
        /// There is no worker of that number.
        NoSuchWorker = -32020,
        /// There is no such CPU, or it is not allowed to the daemon.
        NoSuchCpu = -32021,
        /// The list of worker CPUs is empty or names one twice.
        BadWorkerCpus = -32022,
        /// A system call failed.
        System = -32030,
        /// All connections of the control socket that the client may have are taken.
        TooManyConnections = -32040,
        /// A line is longer than the server takes; it closes the connection.
        LineTooLong = -32041,
        /// A batch has more requests, or would have a longer answer, than the server takes.
        BatchTooLarge = -32042,
        /// The client was idle for too long, or while an operator needed its place; the server
        /// closes the connection, and nothing that came since the last answer was carried out.
        Idle = -32043,
        /// As many clients as may have a stream of this kind already.
        TooManyStreams = -32044,
        /// The filter of a capture does not compile.
        Filter = -32045,
    }
}

/// A refusal: what, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The kind.
    pub kind: ErrorKind,
    /// One line that says what is wrong.
    pub message: String,
    /// One line that says what to do.
    pub hint: String,
}

impl ApiError {
    /// An error of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: hint.into(),
        }
    }
}

impl From<SwitchError> for ApiError {
    fn from(error: SwitchError) -> Self {
        let kind = match &error {
            SwitchError::NoSuchCpu { .. } => ErrorKind::NoSuchCpu,
            SwitchError::BadWorkerCpus { .. } => ErrorKind::BadWorkerCpus,
            SwitchError::PortExists { .. } => ErrorKind::PortExists,
            SwitchError::NoSuchPort { .. } => ErrorKind::NoSuchPort,
            SwitchError::NoSuchQueue { .. } => ErrorKind::NoSuchQueue,
            SwitchError::NoSuchWorker { .. } => ErrorKind::NoSuchWorker,
            SwitchError::TooManyPorts => ErrorKind::TooManyPorts,
            SwitchError::SocketPath { .. } => ErrorKind::SocketPath,
            SwitchError::Tap { .. } => ErrorKind::Tap,
            SwitchError::AfXdp { .. } => ErrorKind::AfXdp,
            SwitchError::NoSuchFdbEntry { .. } => ErrorKind::NoSuchFdbEntry,
            SwitchError::FdbRefused { .. } => ErrorKind::FdbRefused,
            SwitchError::Filter { .. } => ErrorKind::Filter,
            SwitchError::TooManyStreams { .. } => ErrorKind::TooManyStreams,
            SwitchError::SeveralVlans { .. } => ErrorKind::SeveralVlans,
            SwitchError::VlanOfPort { .. } => ErrorKind::VlanOfPort,
            SwitchError::System { .. } => ErrorKind::System,
        };
        Self::new(kind, error.to_string(), error.hint())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_unique_and_within_the_documented_ranges() {
        let codes: BTreeSet<i32> = ErrorKind::ALL.iter().map(|kind| kind.code()).collect();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        for code in codes {
            let standard = matches!(code, -32700 | -32603..=-32600);
            assert!(standard || (-32099..=-32000).contains(&code), "{code}");
        }
    }

    #[test]
    fn a_refusal_of_the_switch_keeps_its_text_and_hint() {
        let error = ApiError::from(SwitchError::NoSuchPort {
            name: "vm1".parse().unwrap(),
        });
        assert_eq!(error.kind, ErrorKind::NoSuchPort);
        assert_eq!(error.message, "there is no port vm1");
        assert_eq!(error.hint, "`ringway port list` shows the ports");
    }
}
