//! Scripted faults: what shall go wrong, where, and how often.
//!
//! Before it: a test scripts. After it: [`super::front`] asks, for each request, whether it is its turn.
//! Thread: any. Allocates: when a fault is scripted.
//! Invariant: a fault strikes exactly as often as it says, in the order of scripting.
//! Not here: how a fault looks on the wire ([`super::front`]).

use std::sync::Mutex;
use std::time::Duration;

/// What a request is for, and so which faults can strike it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// The Entra token endpoint.
    Token,
    /// The managed identity endpoint.
    Imds,
    /// `/v1/rest/auth/metadata`.
    Metadata,
    /// `.get ingestion resources` and `.show ingestion resources`.
    Resources,
    /// `.get kusto identity token`.
    IdentityToken,
    /// Every other management command.
    Management,
    /// Put Blob.
    BlobPut,
    /// Put Block.
    BlockPut,
    /// Put Block List.
    BlockListPut,
    /// Get Blob and Get Blob Properties.
    BlobGet,
    /// Put Message.
    QueuePost,
    /// Get, Peek and Delete Message.
    QueueGet,
    /// The stand-in's own pages; never struck.
    Page,
}

/// A fault to come.
#[derive(Debug, Clone)]
pub struct Fault {
    pub target: Target,
    /// Only requests to this storage account; `None` is any.
    pub account: Option<usize>,
    /// How often it strikes; `usize::MAX` is until [`super::Standin::clear_faults`].
    pub times: usize,
    pub action: Action,
}

/// What happens to a request instead of what should.
#[derive(Debug, Clone)]
pub enum Action {
    /// It is answered with this status, in the error format of its service.
    Status {
        code: u16,
        /// `ServerBusy`, `invalid_client`, …: the code within the body (and in `x-ms-error-code`).
        error_code: &'static str,
        /// The seconds of a `Retry-After` header.
        retry_after: Option<u32>,
    },
    /// It is carried out this much later, in real time.
    Delay(Duration),
    /// Its body is read, nothing is done, and no answer comes.
    TimeoutBeforeAccept,
    /// It is carried out, and no answer comes.
    TimeoutAfterAccept,
    /// The connection is reset when half of its body has come; nothing is done.
    ResetMidBody,
    /// It is carried out, and the connection is reset instead of an answer.
    ResetAfterAccept,
}

/// The faults that have not struck out yet.
#[derive(Debug, Default)]
pub(super) struct Script {
    faults: Mutex<Vec<Fault>>,
}

impl Script {
    pub fn add(&self, fault: Fault) {
        self.faults.lock().unwrap().push(fault);
    }

    pub fn clear(&self) {
        self.faults.lock().unwrap().clear();
    }

    /// The action that strikes this request, if one does.
    pub fn take(&self, target: Target, account: Option<usize>) -> Option<Action> {
        let mut faults = self.faults.lock().unwrap();
        faults.retain(|fault| fault.times > 0);
        let fault = faults.iter_mut().find(|fault| {
            fault.target == target && fault.account.is_none_or(|wanted| account == Some(wanted))
        })?;
        if fault.times != usize::MAX {
            fault.times -= 1;
        }
        Some(fault.action.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strikes_as_often_as_it_says_and_where_it_says() {
        let script = Script::default();
        script.add(Fault {
            target: Target::BlobPut,
            account: Some(1),
            times: 2,
            action: Action::TimeoutAfterAccept,
        });
        assert!(script.take(Target::BlobPut, Some(0)).is_none());
        assert!(script.take(Target::QueuePost, Some(1)).is_none());
        assert!(script.take(Target::BlobPut, Some(1)).is_some());
        assert!(script.take(Target::BlobPut, Some(1)).is_some());
        assert!(script.take(Target::BlobPut, Some(1)).is_none());
    }
}
