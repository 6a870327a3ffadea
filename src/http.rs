//! HTTP: from bytes in a slab to one request, and from an outcome to one reply.
//!
//! Before it: [`crate::connection`] reads into a slab.
//! After it: the body, still in the slab, goes to [`crate::encoder`].
//! Not here: any I/O; these are pure functions of bytes.

pub mod proxy;
pub mod syntax;
pub mod target;
pub mod media_type;
pub mod h1;
pub mod chunked;
pub mod reply;
pub mod h2;
pub mod frames;
