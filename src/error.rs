//! Errors, by who must act. Here: [`Fatal`], the machine's or the operator's.
//!
//! A `Fatal` ends the process. It is made where the cause is known, travels up unchanged,
//! and `main.rs` prints it once and exits with its code.
//! Its message says in one sentence what is wrong and what to change.
//! Main thread mostly; a reactor that can't start sends one to the main thread.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::{ConfigErrors, Size};

/// Why the process can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// One line per error, each `file:line:column: message`.
    #[error(transparent)]
    Config(#[from] ConfigErrors),

    #[error("cannot read the configuration {}: {source}; check the path given with --config", path.display())]
    ConfigUnreadable { path: PathBuf, source: io::Error },

    #[error(
        "the memory sum is {:.2}, above the limit of {:.2} ({limit_origin}); raise the limit or reduce \
         the largest terms: {largest}",
        Size(*sum), Size(*limit)
    )]
    BudgetExceeded {
        /// Bytes the configuration adds up to.
        sum: u64,
        /// Bytes allowed.
        limit: u64,
        /// Who set the limit.
        limit_origin: String,
        /// The terms that matter, with the keys that change them.
        largest: String,
    },

    #[error(
        "the kernel refuses io_uring ({source}); weir needs Linux 5.19 or later, the sysctl \
         kernel.io_uring_disabled at 0, and in a container a seccomp profile that allows \
         io_uring_setup, io_uring_enter and io_uring_register"
    )]
    IoUringRefused { source: io::Error },

    #[error(
        "the address {address} is already in use; stop the process that has it or change the \
         address in the configuration"
    )]
    PortTaken { address: SocketAddr },

    #[error("cannot listen on {address}: {source}; change the address in the configuration")]
    Bind {
        address: SocketAddr,
        source: io::Error,
    },

    #[error(
        "cannot write to the directory {}: {source}; create it writable for this user or change \
         destination.path", path.display()
    )]
    DirectoryNotWritable { path: PathBuf, source: io::Error },

    #[error(
        "slabs.registered = \"require\", but the kernel did not register {:.2} of slabs ({source}); \
         raise the memlock limit (ulimit -l {}, or LimitMEMLOCK= in systemd, or --ulimit memlock= \
         for a container) or set slabs.registered = \"prefer\"",
        Size(*size), size.div_ceil(1024)
    )]
    SlabsNotRegistered {
        /// Bytes of slabs of all cores.
        size: u64,
        source: io::Error,
    },

    #[error("{action} failed: {source}")]
    Io {
        /// What was tried, as a noun: "starting the thread of core 3".
        action: String,
        source: io::Error,
    },
}

impl Fatal {
    /// 2 for what the configuration must change, 1 for the machine.
    /// (clap exits with 2 as well when the arguments are wrong.)
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::ConfigUnreadable { .. } => 2,
            _ => 1,
        }
    }
}
