//! A sender: posts requests with unique ids, one at a time, and remembers what it was told about each.
//!
//! Before it: [`crate::kill`] says where weir listens. After it: [`super::judge`] holds weir to what was acknowledged.
//! Thread: one per sender and round. Allocates per request; it remembers some tens of bytes of each.
//! Invariant: what a request holds is fixed when it is first sent; sending it again sends the same bytes.
//! Not here: speed. The load is there so that a kill meets weir at work.

use super::records::{RecordId, TABLES, record};
use crate::event::Random;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An answer that takes longer is a hang.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests to be sent again; when there are more, the oldest are given up.
const AGAIN_MAX: usize = 8;
/// Lines of a batch at most. Some batches are larger than an upload buffer.
const BATCH_LINES_MAX: u64 = 1_000;
/// Faults that one sender tells of.
const FAULTS_MAX: usize = 5;

/// One request, sent once or more often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The number of its first record; the others follow.
    pub number_first: u64,
    pub record_count: u64,
    pub is_large: bool,
    /// Index in [`TABLES`].
    pub table_index: usize,
    pub send_count: u64,
    /// The round in which a 2xx came.
    pub acknowledged_in: Option<u32>,
}

/// What a sender was told, added up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    pub acknowledged: u64,
    pub records_acknowledged: u64,
    /// 503, by code.
    pub refused: BTreeMap<String, u64>,
    /// Requests that were out when the connection ended.
    pub cut_off: u64,
}

impl Told {
    pub fn add(&mut self, other: &Told) {
        self.acknowledged += other.acknowledged;
        self.records_acknowledged += other.records_acknowledged;
        for (code, count) in &other.refused {
            *self.refused.entry(code.clone()).or_default() += count;
        }
        self.cut_off += other.cut_off;
    }
}

pub struct Sender {
    seed: u64,
    index: usize,
    random: Random,
    number_next: u64,
    requests: Vec<Sent>,
    /// Requests without a final answer, to be sent again.
    again: VecDeque<usize>,
    faults: Vec<String>,
}

/// What a round gives a sender.
#[derive(Clone, Copy)]
pub struct Orders<'a> {
    pub round: u32,
    pub address: SocketAddr,
    /// Bytes of requests after which the sender rests.
    pub size_max: usize,
    /// Set before the server is killed: from then on a connection may end.
    pub killing: &'a AtomicBool,
}

impl Sender {
    pub fn new(seed: u64, index: usize) -> Self {
        Sender {
            seed,
            index,
            random: Random::of(seed, u64::MAX - index as u64),
            number_next: 0,
            requests: Vec::new(),
            again: VecDeque::new(),
            faults: Vec::new(),
        }
    }

    /// A sender with a past.
    #[cfg(test)]
    pub fn remembering(seed: u64, index: usize, requests: Vec<Sent>) -> Self {
        Sender {
            number_next: requests.iter().map(|sent| sent.record_count).sum(),
            requests,
            ..Sender::new(seed, index)
        }
    }

    pub fn requests(&self) -> &[Sent] {
        &self.requests
    }

    pub fn record_count(&self) -> u64 {
        self.number_next
    }

    /// What the server did that no server may do.
    pub fn faults(&self) -> &[String] {
        &self.faults
    }

    /// Posts until the connection ends, the bytes are spent, or the server is about to be killed.
    pub fn send(&mut self, orders: Orders<'_>) -> Told {
        let mut told = Told::default();
        if let Err(error) = self.try_send(orders, &mut told)
            && !orders.killing.load(Ordering::Acquire)
        {
            self.fault(format!(
                "round {}: a connection failed while nobody was killed: {error}",
                orders.round
            ));
        }
        told
    }

    fn try_send(&mut self, orders: Orders<'_>, told: &mut Told) -> io::Result<()> {
        let mut connection = Connection::open(orders.address)?;
        let mut size = 0;
        while size < orders.size_max && !orders.killing.load(Ordering::Acquire) {
            let index = self.next_request();
            let bytes = self.bytes(index);
            size += bytes.len();
            self.requests[index].send_count += 1;
            match connection.exchange(&bytes) {
                Ok(answer) => {
                    let closes = answer.closes;
                    self.settle(index, answer, orders.round, told);
                    if closes {
                        connection = Connection::open(orders.address)?;
                    }
                }
                Err(error) => {
                    told.cut_off += 1;
                    self.perhaps_again(index);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// A new request, or one that has no final answer yet.
    fn next_request(&mut self) -> usize {
        if !self.again.is_empty() && self.random.below(4) == 0 {
            return self.again.pop_front().expect("not empty");
        }
        let (record_count, is_large) = match self.random.below(100) {
            0..=2 => (2 + self.random.below(BATCH_LINES_MAX - 1), false),
            3..=12 => (2 + self.random.below(30), false),
            13..=15 => (1, true),
            _ => (1, false),
        };
        self.requests.push(Sent {
            number_first: self.number_next,
            record_count,
            is_large,
            table_index: usize::from(self.random.below(4) == 0),
            send_count: 0,
            acknowledged_in: None,
        });
        self.number_next += record_count;
        self.requests.len() - 1
    }

    fn bytes(&self, index: usize) -> Vec<u8> {
        let sent = &self.requests[index];
        let mut body = String::new();
        for number in sent.number_first..sent.number_first + sent.record_count {
            let id = RecordId {
                sender: self.index,
                number,
            };
            body.push_str(&record(self.seed, id, sent.is_large));
            body.push('\n');
        }
        let path = TABLES[sent.table_index].path;
        let size = body.len();
        format!("POST {path} HTTP/1.1\r\nHost: weir\r\nContent-Length: {size}\r\n\r\n{body}")
            .into_bytes()
    }

    fn settle(&mut self, index: usize, answer: Answer, round: u32, told: &mut Told) {
        let sent = &mut self.requests[index];
        match answer.status {
            201 if answer.ack.as_deref() == Some("durable")
                && answer.body.trim() == format!("{{\"accepted\":{}}}", sent.record_count) =>
            {
                sent.acknowledged_in = Some(round);
                told.acknowledged += 1;
                told.records_acknowledged += sent.record_count;
            }
            503 => {
                let code = answer
                    .body
                    .split('"')
                    .nth(3)
                    .unwrap_or("no code")
                    .to_owned();
                *told.refused.entry(code).or_default() += 1;
                self.perhaps_again(index);
            }
            _ => self.fault(format!(
                "round {round}: an answer nobody expects: {answer:?}"
            )),
        }
    }

    /// Half of the senders of this world try again.
    fn perhaps_again(&mut self, index: usize) {
        if self.random.below(2) == 0 {
            if self.again.len() == AGAIN_MAX {
                self.again.pop_front();
            }
            self.again.push_back(index);
        }
    }

    fn fault(&mut self, fault: String) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(format!("sender {}: {fault}", self.index));
        }
    }
}

struct Connection {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    ack: Option<String>,
    closes: bool,
    body: String,
}

impl Connection {
    fn open(address: SocketAddr) -> io::Result<Connection> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection {
            reader: BufReader::new(stream.try_clone()?),
            stream,
        })
    }

    /// Sends a request and reads its answer whole.
    fn exchange(&mut self, request: &[u8]) -> io::Result<Answer> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        self.stream.write_all(request)?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.reader.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let field = |wanted: &str| {
            head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case(wanted)
                    .then(|| value.trim().to_owned())
            })
        };
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let size = field("content-length").and_then(|size| size.parse().ok());
        let mut body = vec![0; size.ok_or_else(|| invalid("an answer without a length"))?];
        self.reader.read_exact(&mut body)?;
        Ok(Answer {
            status: status.ok_or_else(|| invalid("an answer without a status"))?,
            ack: field("weir-ack"),
            closes: field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")),
            body: String::from_utf8(body).map_err(|_| invalid("an answer that is no text"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Takes one connection and gives these answers, a request each, then ends it.
    fn answering(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a sender");
            let mut reader = BufReader::new(stream.try_clone().expect("cloned"));
            for answer in answers {
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    reader.read_line(&mut head).expect("a head");
                }
                let size = head.split("Content-Length: ").nth(1).expect("a length");
                let mut body = vec![0; size.trim().parse().expect("a number")];
                reader.read_exact(&mut body).expect("a body");
                let lines = body.iter().filter(|byte| **byte == b'\n').count();
                let answer = answer.replace("LINES", &lines.to_string());
                let size = answer.split("\r\n\r\n").nth(1).expect("a body").len();
                let answer = answer.replace("SIZE", &size.to_string());
                stream.write_all(answer.as_bytes()).expect("written");
            }
        });
        address
    }

    const STORED: &str = "HTTP/1.1 201 Created\r\nWeir-Ack: durable\r\nContent-Length: SIZE\r\n\r\n{\"accepted\":LINES}";
    const IN_MEMORY: &str = "HTTP/1.1 201 Created\r\nWeir-Ack: memory\r\nContent-Length: SIZE\r\n\r\n{\"accepted\":LINES}";
    const FULL: &str =
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: SIZE\r\n\r\n{\"code\":\"spool_full\"}";

    fn send(sender: &mut Sender, answers: &'static [&'static str], killing: bool) -> Told {
        let killing_flag = AtomicBool::new(false);
        let orders = Orders {
            round: 9,
            address: answering(answers),
            size_max: usize::MAX,
            killing: &killing_flag,
        };
        if !killing {
            return sender.send(orders);
        }
        // What `send` does, after a kill that came while a request was out.
        let mut told = Told::default();
        assert!(sender.try_send(orders, &mut told).is_err());
        told
    }

    #[test]
    fn only_a_success_that_says_durable_is_one() {
        let mut sender = Sender::new(1, 0);
        let told = send(&mut sender, &[STORED, FULL, STORED], true);
        assert_eq!((told.acknowledged, told.cut_off), (2, 1));
        assert_eq!(told.refused, BTreeMap::from([("spool_full".to_owned(), 1)]));
        assert!(sender.faults().is_empty());
        let acknowledged = sender
            .requests()
            .iter()
            .filter(|sent| sent.acknowledged_in == Some(9));
        assert_eq!(acknowledged.count(), 2);
        let sends: u64 = sender.requests().iter().map(|sent| sent.send_count).sum();
        assert_eq!(sends, 4);

        let told = send(&mut sender, &[IN_MEMORY], true);
        assert_eq!(told.acknowledged, 0);
        assert_eq!(sender.faults().len(), 1);
    }

    #[test]
    fn a_connection_that_ends_for_no_reason_is_a_fault() {
        let mut sender = Sender::new(1, 0);
        send(&mut sender, &[STORED], false);
        assert!(sender.faults()[0].contains("while nobody was killed"));
    }

    #[test]
    fn requests_hold_consecutive_records_and_stay_what_they_are() {
        let mut sender = Sender::new(1, 2);
        for _ in 0..500 {
            sender.next_request();
        }
        let mut number = 0;
        for sent in sender.requests() {
            assert_eq!(sent.number_first, number);
            number += sent.record_count;
        }
        assert_eq!(number, sender.record_count());
        assert_eq!(sender.bytes(17), sender.bytes(17));
        assert!(sender.requests().iter().any(|sent| sent.is_large));
        assert!(sender.requests().iter().any(|sent| sent.record_count > 30));
        assert!(sender.requests().iter().any(|sent| sent.table_index == 1));
    }
}
