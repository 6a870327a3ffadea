//! Admission: who may send, from where, and how much.
//!
//! Before it: a head, and the route that its path has.
//! After it: [`crate::connection`] reads the body; for a signature it asks once more when the body is there.
//! Thread: made off the reactors, at start and at a reload, and read by all of them; what they change is the rates'
//! atomics. Allocates: when it is made. A request allocates nothing.
//! Invariant: nothing is stored before everything that was asked for has been shown, and an answer does not say which
//! part of a credential was wrong, neither by its text nor by the time it took.
//! Not here: verifying a certificate, which [`crate::tls`] has done; here it is somebody's or nobody's.
//!
//! What a listener asks for holds for all of its routes; a route with principals of its own asks for those instead.
//! Networks add up: both the listener's and the route's must allow the address.

pub mod authorization;
mod rate;
mod signature;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustls::pki_types::CertificateDer;

use crate::config::{self, Config, Credential, Rate};
use crate::error::{Fatal, Reject};
use crate::http::h1;
use crate::tls::certificate;
use authorization::Credentials;
use rate::Limiter;
use signature::Signer;

/// What all listeners and routes ask for.
pub struct Admission {
    started_at: Instant,
    /// By listener, then by route, in the order of the configuration.
    listeners: Vec<Gate>,
    routes: Vec<Gate>,
    credentials: Credentials,
    /// By principal.
    principals: Vec<Arc<Limiter>>,
    signers: Vec<Signer>,
    /// Names in certificates, and whose they are.
    certificates: HashMap<String, usize>,
}

/// What a peer has shown in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certificate {
    None,
    /// A good one that no principal is known by.
    Unknown,
    /// The index of the principal.
    Known(usize),
}

/// What one listener or route asks for.
struct Gate {
    policy: Option<Policy>,
    allow: Vec<IpNet>,
    limiter: Arc<Limiter>,
}

/// Who may send.
struct Policy {
    /// By principal.
    allowed: Vec<bool>,
    challenges: Challenges,
    /// Whether a certificate would do.
    certificates: bool,
}

/// The kinds of credentials that would do: RFC 9110 §11.6.1 wants them named in a 401.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Challenges {
    pub bearer: bool,
    pub basic: bool,
    pub hmac: bool,
}

/// What a request asks with.
pub struct Request<'a> {
    pub listener_index: usize,
    /// In the order of the configuration; `None` where no route has the path.
    pub route_index: Option<usize>,
    pub peer: IpAddr,
    pub certificate: Certificate,
    /// All of it, line ends included.
    pub head: &'a [u8],
    /// Bytes of the body, where the head says.
    pub size: Option<u64>,
}

/// A request that may go on: what is still to be done when its body is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    listener_index: usize,
    route_index: usize,
    principal_index: Option<usize>,
    /// The body's signature has to be looked at.
    signed: bool,
    /// The size of the body was not known.
    unmeasured: bool,
}

impl Admission {
    /// Reads all secrets.
    pub fn load(config: &Config) -> Result<Admission, Fatal> {
        Self::build(config, None)
    }

    /// What follows this one, which was made of `before`. All secrets are read again. A rate that is as before goes on
    /// with what is left of it; one that is new or another begins full.
    pub fn reload(&self, before: &Config, config: &Config) -> Result<Admission, Fatal> {
        Self::build(config, Some((self, before)))
    }

    fn build(config: &Config, before: Option<(&Admission, &Config)>) -> Result<Admission, Fatal> {
        let mut credentials = Credentials::default();
        let mut signers = Vec::new();
        let mut certificates = HashMap::new();
        for (index, principal) in config.principals.iter().enumerate() {
            let fault = |source| Fatal::Secret {
                principal: principal.name.clone(),
                source,
            };
            match &principal.credential {
                Credential::Bearer(tokens) => {
                    for token in tokens {
                        credentials.add_token(index, token).map_err(fault)?;
                    }
                }
                Credential::Basic { user, passwords } => {
                    for password in passwords {
                        credentials
                            .add_password(index, user, password)
                            .map_err(fault)?;
                    }
                }
                Credential::Hmac(hmac) => {
                    signers.push(Signer::load(index, hmac).map_err(fault)?);
                }
                Credential::Certificate(names) => {
                    let names = names.iter().map(|name| certificate::normalised(name));
                    certificates.extend(names.map(|name| (name, index)));
                }
            }
        }
        let policy = |allowed: &Option<Vec<usize>>| {
            allowed.as_ref().map(|allowed| Policy::new(config, allowed))
        };
        let fresh = |rate: Option<Rate>| Arc::new(Limiter::new(rate));
        Ok(Admission {
            // What a limiter counts from.
            started_at: before.map_or_else(Instant::now, |(admission, _)| admission.started_at),
            listeners: config
                .listeners
                .iter()
                .map(|listener| Gate {
                    policy: policy(&listener.principals),
                    allow: listener.allow.clone(),
                    limiter: fresh(None),
                })
                .collect(),
            routes: config
                .routes
                .iter()
                .map(|route| Gate {
                    policy: policy(&route.principals),
                    allow: route.allow.clone(),
                    limiter: before
                        .and_then(|(admission, before)| {
                            let is_same = |known: &config::Route| {
                                known.pattern == route.pattern && known.rate == route.rate
                            };
                            let index = before.routes.iter().position(is_same)?;
                            Some(admission.routes[index].limiter.clone())
                        })
                        .unwrap_or_else(|| fresh(route.rate)),
                })
                .collect(),
            credentials,
            principals: config
                .principals
                .iter()
                .map(|principal| {
                    let kept = before.and_then(|(admission, before)| {
                        let is_same = |known: &config::Principal| {
                            known.name == principal.name && known.rate == principal.rate
                        };
                        let index = before.principals.iter().position(is_same)?;
                        Some(admission.principals[index].clone())
                    });
                    kept.unwrap_or_else(|| fresh(principal.rate))
                })
                .collect(),
            signers,
            certificates,
        })
    }

    /// Whose certificate it is. It has been verified. Where its names are of several principals, the subject counts
    /// before the alternative names, in their order.
    pub fn certificate(&self, shown: &CertificateDer<'_>) -> Certificate {
        let known = certificate::names(shown)
            .iter()
            .find_map(|name| self.certificates.get(name).copied());
        known.map_or(Certificate::Unknown, Certificate::Known)
    }

    /// What tells the secrets of a principal from others, and from them nothing else can be told.
    pub fn secrets(&self, principal_index: usize) -> Vec<[u8; 32]> {
        let signers = self.signers.iter();
        let mut own = signers.filter(|signer| signer.principal_index == principal_index);
        match own.next() {
            Some(signer) => signer.key_digests(),
            None => self.credentials.hashes(principal_index),
        }
    }

    /// Decides from the head alone. `None` where there is no route, but nothing else is wrong.
    pub fn admit(&self, request: &Request<'_>) -> Result<Option<Admitted>, Reject> {
        let listener = &self.listeners[request.listener_index];
        let route = request.route_index.map(|index| &self.routes[index]);
        let peer = request.peer.to_canonical();
        if !listener.allows(peer) || !route.is_none_or(|route| route.allows(peer)) {
            return Err(Reject::Forbidden);
        }
        let policy = route
            .and_then(|route| route.policy.as_ref())
            .or(listener.policy.as_ref());
        let (principal_index, signed) = match policy {
            None => (None, false),
            Some(policy) => self.authenticate(policy, request.certificate, request.head)?,
        };
        let Some(route_index) = request.route_index else {
            return Ok(None);
        };
        let admitted = Admitted {
            listener_index: request.listener_index,
            route_index,
            principal_index,
            signed,
            unmeasured: request.size.is_none(),
        };
        // Who a signed request is from is only known with its body.
        if !signed {
            self.charge(&admitted, request.size.unwrap_or(0))?;
        }
        Ok(Some(admitted))
    }

    /// Whether anything is left to look at once the body is there.
    pub fn admit_body(&self, admitted: &Admitted, head: &[u8], body: &[u8]) -> Result<(), Reject> {
        let size = body.len() as u64;
        if admitted.signed {
            let policy = self.policy(admitted);
            let principal_index = self.verify(policy, head, body)?;
            let admitted = Admitted {
                principal_index: Some(principal_index),
                ..*admitted
            };
            return self.charge(&admitted, size);
        }
        if admitted.unmeasured {
            let now = self.started_at.elapsed();
            for limiter in self.limiters(admitted) {
                limiter.add_size(now, size);
            }
        }
        Ok(())
    }

    fn policy(&self, admitted: &Admitted) -> Option<&Policy> {
        let route = self.routes[admitted.route_index].policy.as_ref();
        route.or(self.listeners[admitted.listener_index].policy.as_ref())
    }

    /// The principal that the handshake or the head shows, or that the body's signature has to be verified.
    fn authenticate(
        &self,
        policy: &Policy,
        certificate: Certificate,
        head: &[u8],
    ) -> Result<(Option<usize>, bool), Reject> {
        if let Certificate::Known(principal) = certificate
            && policy.allowed[principal]
        {
            return Ok((Some(principal), false));
        }
        let unauthenticated = Reject::Unauthenticated(policy.challenges);
        if let Some(value) = h1::field(head, "authorization")? {
            let principal = self.credentials.principal(value).ok_or(unauthenticated)?;
            return match policy.allowed[principal] {
                true => Ok((Some(principal), false)),
                false => Err(Reject::Forbidden),
            };
        }
        for signer in self.signers(policy) {
            if signer.signature(head)?.is_some() {
                return Ok((None, true));
            }
        }
        let is_wrong_certificate = policy.certificates && certificate != Certificate::None;
        // RFC 9110 §15.5.2: a 401 names a scheme, and there is none for certificates.
        let has_scheme = policy.challenges != Challenges::default();
        match has_scheme && !is_wrong_certificate {
            true => Err(unauthenticated),
            false => Err(Reject::Forbidden),
        }
    }

    fn verify(&self, policy: Option<&Policy>, head: &[u8], body: &[u8]) -> Result<usize, Reject> {
        let Some(policy) = policy else {
            unreachable!("only a policy asks for a signature");
        };
        for signer in self.signers(policy) {
            if let Some(signature) = signer.signature(head)?
                && signer.verifies(&signature, body)
            {
                return Ok(signer.principal_index);
            }
        }
        Err(Reject::Unauthenticated(policy.challenges))
    }

    fn signers<'a>(&'a self, policy: &'a Policy) -> impl Iterator<Item = &'a Signer> {
        self.signers
            .iter()
            .filter(|signer| policy.allowed[signer.principal_index])
    }

    fn limiters(&self, admitted: &Admitted) -> impl Iterator<Item = &Limiter> {
        let route = &self.routes[admitted.route_index].limiter;
        let principal = admitted
            .principal_index
            .map(|index| &*self.principals[index]);
        std::iter::once(&**route).chain(principal)
    }

    /// Takes the request from what its route and its principal may still send, or from neither.
    fn charge(&self, admitted: &Admitted, size: u64) -> Result<(), Reject> {
        if self.limiters(admitted).all(Limiter::is_unlimited) {
            return Ok(());
        }
        let now = self.started_at.elapsed();
        let wait = self
            .limiters(admitted)
            .map(|limiter| limiter.wait(now, size))
            .max()
            .unwrap_or(Duration::ZERO);
        if !wait.is_zero() {
            // Rounded up: a second is what Retry-After counts in (RFC 9110 §10.2.3).
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            return Err(Reject::RateLimited {
                retry_after_seconds: u32::try_from(seconds).unwrap_or(u32::MAX),
            });
        }
        for limiter in self.limiters(admitted) {
            limiter.add_request(now);
            limiter.add_size(now, size);
        }
        Ok(())
    }
}

impl Gate {
    fn allows(&self, peer: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|network| network.contains(&peer))
    }
}

impl Policy {
    fn new(config: &Config, indexes: &[usize]) -> Self {
        let mut policy = Policy {
            allowed: vec![false; config.principals.len()],
            challenges: Challenges::default(),
            certificates: false,
        };
        for index in indexes {
            policy.allowed[*index] = true;
            match config.principals[*index].credential {
                Credential::Bearer(_) => policy.challenges.bearer = true,
                Credential::Basic { .. } => policy.challenges.basic = true,
                Credential::Hmac(_) => policy.challenges.hmac = true,
                Credential::Certificate(_) => policy.certificates = true,
            }
        }
        policy
    }
}

#[cfg(test)]
mod tests;
