//! Running nodes for the targets that talk to one.
//!
//! A node takes no deadline for one that a busy machine could miss, and promises nothing that would need a disk, or a sync
//! for every input.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread;

use weir::config::Config;
use weir::node::Node;

/// Starts a node that runs until the process ends, with `listener` as further keys of its listener and `more` as further
/// tables; where it listens.
pub fn start(listener: &str, more: &str) -> SocketAddr {
    let text = format!(
        "[[listener]]\naddress = \"127.0.0.1:0\"\n{listener}[admin]\naddress = \"127.0.0.1:0\"\n\
         [destination]\ntype = \"null\"\n\
         [slabs]\nregistered = \"never\"\n\
         classes = [{{ size = \"16KiB\", count = 4 }}, {{ size = \"64KiB\", count = 4 }}]\n\
         {more}[[route]]\npath = \"/*\"\nack = \"memory\"\n"
    );
    let config = Config::parse(&text, "fuzz.toml".as_ref(), ".".as_ref())
        .unwrap_or_else(|errors| panic!("{errors}"));
    let (sender, receiver) = mpsc::channel();
    // The thread has the node until the process ends: a leaked one would be found by the fuzzer's sanitizer.
    thread::spawn(move || {
        let node = Node::start(config, false).unwrap_or_else(|fatal| panic!("{fatal}"));
        let _ = sender.send(node.listeners()[0]);
        loop {
            thread::park();
        }
    });
    receiver.recv().expect("a node that has started")
}
