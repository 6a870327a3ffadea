//! weir takes events over HTTP and delivers them as gzip blobs, on memory that does not move.
//!
//! The flow of a request, and where each step lives:
//!
//! 1. [`accept`]: a socket gets a place on one core; its task is a [`connection`].
//! 2. [`slab`]: when there is something to read, the connection takes a fixed buffer; [`tls`] opens records there.
//! 3. [`http`]: head and chunked body are parsed where they lie.
//! 4. [`route`] and [`admission`]: the path picks a configured table, and it is decided who may send to it.
//! 5. [`records`]: the body is checked in full, split and compacted where it lies.
//! 6. [`envelope`] and [`encoder`]: records become rows.
//! 7. [`deflate`]: rows become one streaming gzip member, in an [`upload_buffer`].
//! 8. [`commit`]: what the member grew by becomes a frame of its segment in the [`spool`], synced; [`ack`] answers.
//! 9. [`uplink`]: the sealed buffer, or the segment, is delivered, and comes back.
//!
//! [`reactor`] is the core on which 1 to 8 happen, and shares nothing; [`node`] is all of them.
//! [`standin`] is no step: it plays the remote end.

pub mod cli;
pub mod config;
pub mod limits;
pub mod budget;
pub mod error;
pub mod secret;
pub mod node;
pub mod reactor;
pub mod clock;
pub mod wait;
pub mod memory;
pub mod deadline;
pub mod accept;
pub mod slab;
pub mod tls;
pub mod connection;
pub mod http;
pub mod route;
pub mod admission;
pub mod records;
pub mod envelope;
pub mod encoder;
pub mod deflate;
pub mod upload_buffer;
pub mod spool;
pub mod commit;
pub mod ack;
pub mod uplink;
pub mod metrics;
pub mod admin;
pub mod standin;
