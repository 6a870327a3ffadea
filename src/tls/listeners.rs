//! The listeners' certificates: loaded at start, and again when their files change.
//!
//! Before it: `files.rs` makes a configuration of rustls from files.
//! After it: [`crate::connection`] begins a [`Session`] with the newest one.
//! Thread: read by reactors, at a handshake; written by the uplink's runtime. Allocates: when files change.
//! Invariant: a listener always has a pair that works: one that does not never takes the place of one that does, and a
//! connection goes on with what it began with.
//! Not here: SIGHUP and the admin address, which call [`Tls::reload`].

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, SystemTime};

use super::files::{Loaded, Stamp, TlsFault, load, stamps};
use super::{Session, TlsError};
use crate::config::{Config, ListenerTls};
use crate::error::Fatal;
use crate::limits::{TLS_EXPIRY_WARNING, TLS_FILE_CHECK_PAUSE};

/// What the listeners that speak TLS do it with.
pub struct Tls {
    /// In the order of the configuration.
    listeners: Vec<Option<TlsListener>>,
    /// Times that changed files were taken.
    pub reloads: AtomicU64,
    /// Times that changed files were not taken.
    pub reload_failures: AtomicU64,
}

pub struct TlsListener {
    address: SocketAddr,
    files: ListenerTls,
    current: RwLock<Loaded>,
    seen: Mutex<Seen>,
}

/// What is known of the files.
struct Seen {
    /// Their versions when they were last loaded, with whatever outcome.
    loaded: Vec<Option<Stamp>>,
    /// Their versions when they were last looked at.
    last: Vec<Option<Stamp>>,
    /// The days to expiry that were last warned of.
    warned_days: Option<i64>,
}

impl Tls {
    /// Loads what all listeners need.
    pub fn load(config: &Config) -> Result<Tls, Fatal> {
        let listeners = config.listeners.iter().map(|listener| {
            let Some(files) = &listener.tls else {
                return Ok(None);
            };
            TlsListener::load(listener.address, files)
                .map(Some)
                .map_err(|source| Fatal::Tls {
                    address: listener.address,
                    source,
                })
        });
        Ok(Tls {
            listeners: listeners.collect::<Result<_, _>>()?,
            reloads: AtomicU64::new(0),
            reload_failures: AtomicU64::new(0),
        })
    }

    /// The listener of this index in the configuration, where it speaks TLS.
    pub fn listener(&self, index: usize) -> Option<&TlsListener> {
        self.listeners[index].as_ref()
    }

    /// Loads all files again, changed or not, and takes them for new connections if all of them are good; whether one
    /// had changed.
    pub fn reload(&self) -> Result<bool, Fatal> {
        let mut taken = Vec::new();
        for listener in self.listeners.iter().flatten() {
            let stamps = stamps(&listener.files);
            match load(&listener.files) {
                Ok(loaded) => taken.push((listener, loaded, stamps)),
                Err(source) => {
                    self.reload_failures.fetch_add(1, Ordering::Relaxed);
                    return Err(Fatal::Tls {
                        address: listener.address,
                        source,
                    });
                }
            }
        }
        let mut changed = false;
        for (listener, loaded, stamps) in taken {
            changed |= listener.take(loaded, stamps);
        }
        self.reloads
            .fetch_add(u64::from(changed), Ordering::Relaxed);
        Ok(changed)
    }

    /// Address and expiry of every listener that speaks TLS; seconds since 1970.
    pub fn expiries(&self) -> impl Iterator<Item = (SocketAddr, i64)> {
        self.listeners.iter().flatten().map(|listener| {
            let current = listener.current.read().expect("nobody panics with it");
            (listener.address, current.expires_at)
        })
    }

    /// Takes files that change, and warns of certificates that expire, for as long as the runtime lives.
    pub async fn watch(self: Arc<Self>) {
        if self.listeners.iter().flatten().next().is_none() {
            return;
        }
        loop {
            let tls = self.clone();
            // Files may be on a network, so this may block.
            let looked = tokio::task::spawn_blocking(move || tls.look()).await;
            if looked.is_err() {
                return;
            }
            tokio::time::sleep(TLS_FILE_CHECK_PAUSE).await;
        }
    }

    fn look(&self) {
        for listener in self.listeners.iter().flatten() {
            listener.warn_of_expiry(SystemTime::now());
            let Some(stamps) = listener.settled_change() else {
                continue;
            };
            let address = listener.address;
            match load(&listener.files) {
                Ok(loaded) => {
                    listener.take(loaded, stamps);
                    self.reloads.fetch_add(1, Ordering::Relaxed);
                    tracing::info!(listener = %address, "new connections use the certificate that has changed");
                }
                Err(error) => {
                    self.reload_failures.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(
                        listener = %address, %error,
                        "a changed certificate or key is not used; the listener goes on with the one before"
                    );
                }
            }
        }
    }
}

/// What keeps listeners from speaking TLS on this machine, now.
pub fn faults(config: &Config) -> impl Iterator<Item = Fatal> {
    config.listeners.iter().filter_map(|listener| {
        let address = listener.address;
        let source = load(listener.tls.as_ref()?).err()?;
        Some(Fatal::Tls { address, source })
    })
}

impl TlsListener {
    fn load(address: SocketAddr, files: &ListenerTls) -> Result<TlsListener, TlsFault> {
        // Before the content: a change in between is then one more load, and not one that is missed.
        let stamps = stamps(files);
        let loaded = load(files)?;
        Ok(TlsListener {
            address,
            files: files.clone(),
            current: RwLock::new(loaded),
            seen: Mutex::new(Seen {
                loaded: stamps.clone(),
                last: stamps,
                warned_days: None,
            }),
        })
    }

    /// A new session, with the newest certificate; it offers HTTP/2 where asked to.
    pub fn session(&self, offers_http2: bool) -> Result<Session, TlsError> {
        let current = self.current.read().expect("nobody panics with it");
        Session::new(match offers_http2 {
            true => current.with_http2.clone(),
            false => current.config.clone(),
        })
    }

    /// Takes what was loaded from files of these versions; whether they differ from those before.
    fn take(&self, loaded: Loaded, stamps: Vec<Option<Stamp>>) -> bool {
        *self.current.write().expect("nobody panics with it") = loaded;
        let mut seen = self.seen.lock().expect("nobody panics with it");
        let changed = seen.loaded != stamps;
        seen.loaded = stamps;
        seen.warned_days = None;
        changed
    }

    /// The versions of files that have changed and were the same at two looks: a certificate and its key are two files,
    /// and between the two writes they do not match. Each change is returned once.
    fn settled_change(&self) -> Option<Vec<Option<Stamp>>> {
        let stamps = stamps(&self.files);
        let mut seen = self.seen.lock().expect("nobody panics with it");
        let is_settled = seen.last == stamps;
        seen.last.clone_from(&stamps);
        if !is_settled || seen.loaded == stamps {
            return None;
        }
        seen.loaded.clone_from(&stamps);
        Some(stamps)
    }

    /// Once for each day that is left.
    fn warn_of_expiry(&self, now: SystemTime) {
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() as i64);
        let expires_at = self
            .current
            .read()
            .expect("nobody panics with it")
            .expires_at;
        let left = Duration::from_secs(expires_at.saturating_sub(now).max(0) as u64);
        let days = left.as_secs().div_ceil(24 * 60 * 60) as i64;
        let mut seen = self.seen.lock().expect("nobody panics with it");
        if left > TLS_EXPIRY_WARNING || seen.warned_days == Some(days) {
            return;
        }
        seen.warned_days = Some(days);
        let (listener, certificate) = (self.address, self.files.certificate.display());
        match days {
            0 => {
                tracing::error!(%listener, %certificate, "the certificate has expired: clients refuse it");
            }
            days => tracing::warn!(
                %listener, %certificate, days,
                "the certificate expires; put a new one in its place, it is taken without a restart"
            ),
        }
    }
}
