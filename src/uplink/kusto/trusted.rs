//! Trusted hosts: who may be sent a token, a signature or a row.
//!
//! Before it: the configuration names an endpoint, and the endpoint names others (login, audience, storage).
//! After it: a request may leave.
//! Thread: any; a pure function of names. Allocates: never.
//! Invariant: a host that no list has is refused before anything is sent to it, also before the question where to log
//! in, since a token that a hostile host asks for is valid for every cluster of the tenant. Plain http goes to
//! loopback only, and a host that is not loopback cannot send weir to one that is.
//! Not here: redirects; the client follows none (`http.rs`).
//!
//! The lists are those of the official clients: `wellKnownKustoEndpoints.json` in Azure/azure-kusto-python, by the
//! login endpoint of each cloud. Storage is where the ingestion resources of a cloud are, in the classic form and with
//! zoned names (`account.z37.blob.storage.azure.net`).

use reqwest::Url;

/// One cloud: where its identities log in, and which hosts are its clusters and its storage.
struct Cloud {
    login_host: &'static str,
    kusto_suffixes: &'static [&'static str],
    kusto_hosts: &'static [&'static str],
    storage_suffixes: &'static [&'static str],
}

const CLOUDS: [Cloud; 8] = [
    Cloud {
        login_host: "login.microsoftonline.com",
        kusto_suffixes: &[
            ".kusto.windows.net",
            ".kustomfa.windows.net",
            ".kustodev.windows.net",
            ".kusto.azuresynapse.net",
            ".kustodev.azuresynapse-dogfood.net",
            ".kusto.data.microsoft.com",
            ".kusto.fabric.microsoft.com",
            ".dxp.aad.azure.com",
            ".dxp-dev.aad.azure.com",
            ".playfab.com",
            ".playfabapi.com",
            ".azureplayfab.com",
            ".securitycenter.windows.com",
            ".api.securityplatform.microsoft.com",
            ".arg.core.windows.net",
            ".arg-int.core.windows.net",
            ".arg-df.core.windows.net",
        ],
        kusto_hosts: &[
            "ade.applicationinsights.io",
            "ade.loganalytics.io",
            "adx.monitor.azure.com",
            "adx.applicationinsights.azure.com",
            "adx.loganalytics.azure.com",
            "kusto.aria.microsoft.com",
            "eu.kusto.aria.microsoft.com",
            "api.securityplatform.microsoft.com",
        ],
        storage_suffixes: &[".core.windows.net", ".storage.azure.net"],
    },
    Cloud {
        login_host: "login.microsoftonline.us",
        kusto_suffixes: &[
            ".kusto.usgovcloudapi.net",
            ".kustomfa.usgovcloudapi.net",
            ".arg.core.usgovcloudapi.net",
        ],
        kusto_hosts: &[],
        storage_suffixes: &[".core.usgovcloudapi.net"],
    },
    Cloud {
        login_host: "login.partner.microsoftonline.cn",
        kusto_suffixes: &[
            ".kusto.chinacloudapi.cn",
            ".kustomfa.chinacloudapi.cn",
            ".kusto.azuresynapse.azure.cn",
            ".playfab.cn",
        ],
        kusto_hosts: &[],
        storage_suffixes: &[".core.chinacloudapi.cn"],
    },
    Cloud {
        login_host: "login.microsoftonline.eaglex.ic.gov",
        kusto_suffixes: &[".kusto.core.eaglex.ic.gov"],
        kusto_hosts: &[],
        storage_suffixes: &[".core.eaglex.ic.gov"],
    },
    Cloud {
        login_host: "login.microsoftonline.microsoft.scloud",
        kusto_suffixes: &[".kusto.core.microsoft.scloud"],
        kusto_hosts: &[],
        storage_suffixes: &[".core.microsoft.scloud"],
    },
    // The storage names of the clouds below are not published where weir could check them: `trusted_hosts`.
    Cloud {
        login_host: "login.sovcloud-identity.fr",
        kusto_suffixes: &[".kusto.sovcloud-api.fr"],
        kusto_hosts: &[],
        storage_suffixes: &[],
    },
    Cloud {
        login_host: "login.sovcloud-identity.de",
        kusto_suffixes: &[".kusto.sovcloud-api.de"],
        kusto_hosts: &[],
        storage_suffixes: &[],
    },
    Cloud {
        login_host: "login.sovcloud-identity.sg",
        kusto_suffixes: &[".kusto.sovcloud-api.sg"],
        kusto_hosts: &[],
        storage_suffixes: &[],
    },
];

/// What a URL is used for; each role has its own list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes management commands with a token.
    Kusto,
    /// Issues tokens.
    Login,
    /// What a token is for; nothing is sent there.
    Audience,
    /// Holds blobs and queues.
    Storage,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Kusto => "Kusto",
            Role::Login => "login",
            Role::Audience => "Kusto",
            Role::Storage => "storage",
        }
    }
}

/// Why a URL is refused, and what to change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Untrusted {
    #[error(
        "{host} is not a known {} host of this cloud; if it is yours, add it to destination.trusted_hosts", role.name()
    )]
    Host { host: String, role: Role },
    #[error("{host} is not reached by https; plain http goes to loopback only")]
    Scheme { host: String },
    #[error("not a URL with a host")]
    NoHost,
}

/// The hosts that one endpoint's traffic may go to.
#[derive(Clone)]
pub struct TrustedHosts {
    /// The endpoint's own; nothing where only `extra` knows the endpoint.
    cloud: Option<&'static Cloud>,
    extra: Vec<String>,
    is_loopback: bool,
}

impl TrustedHosts {
    /// The hosts that belong to `endpoint`, and those of `extra`: whole names, or suffixes that begin with a dot.
    pub fn of(endpoint: &Url, extra: &[String]) -> Result<Self, Untrusted> {
        let host = host_of(endpoint)?;
        let trusted = TrustedHosts {
            cloud: CLOUDS.iter().find(|cloud| cloud.has_kusto(&host)),
            extra: extra.iter().map(|host| host.to_lowercase()).collect(),
            is_loopback: is_loopback(&host),
        };
        trusted.check(endpoint, Role::Kusto)?;
        Ok(trusted)
    }

    /// Whether a request in this role may go to `url`.
    pub fn check(&self, url: &Url, role: Role) -> Result<(), Untrusted> {
        let host = host_of(url)?;
        let is_local = self.is_loopback && is_loopback(&host);
        let scheme_ok = match url.scheme() {
            "https" => true,
            "http" => is_local,
            _ => false,
        };
        if !scheme_ok {
            return Err(Untrusted::Scheme { host });
        }
        let is_extra = self.extra.iter().any(|known| matches(&host, known));
        let is_known = match (role, self.cloud) {
            (Role::Kusto | Role::Audience, Some(cloud)) => cloud.has_kusto(&host),
            (Role::Login, Some(cloud)) => host == cloud.login_host,
            (Role::Storage, Some(cloud)) => {
                let suffixes = cloud.storage_suffixes;
                suffixes.iter().any(|suffix| host.ends_with(suffix))
            }
            // An endpoint behind a name or an address of one's own is still a cluster of some cloud.
            (Role::Kusto, None) => false,
            (Role::Audience, None) => CLOUDS.iter().any(|cloud| cloud.has_kusto(&host)),
            (Role::Login, None) => CLOUDS.iter().any(|cloud| cloud.login_host == host),
            (Role::Storage, None) => CLOUDS
                .iter()
                .flat_map(|cloud| cloud.storage_suffixes)
                .any(|suffix| host.ends_with(suffix)),
        };
        if is_local || is_extra || is_known {
            Ok(())
        } else {
            Err(Untrusted::Host { host, role })
        }
    }
}

impl Cloud {
    fn has_kusto(&self, host: &str) -> bool {
        self.kusto_hosts.contains(&host)
            || self
                .kusto_suffixes
                .iter()
                .any(|suffix| host.ends_with(suffix))
    }
}

fn matches(host: &str, known: &str) -> bool {
    match known.starts_with('.') {
        true => host.ends_with(known),
        false => host == known,
    }
}

/// Lower case, as `Url` makes it, without the dot that may end a full name.
fn host_of(url: &Url) -> Result<String, Untrusted> {
    let host = url.host_str().ok_or(Untrusted::NoHost)?;
    let host = host.trim_end_matches('.');
    match host.is_empty() {
        true => Err(Untrusted::NoHost),
        false => Ok(host.to_owned()),
    }
}

/// The names that the official clients take for loopback; others of 127.0.0.0/8 are names that nobody needs.
pub fn is_loopback(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(endpoint: &str, extra: &[&str]) -> Result<TrustedHosts, Untrusted> {
        let extra: Vec<String> = extra.iter().map(|&host| host.into()).collect();
        TrustedHosts::of(&endpoint.parse().unwrap(), &extra)
    }

    #[track_caller]
    fn assert_trust(trusted: &TrustedHosts, role: Role, url: &str, expected: bool) {
        let checked = trusted.check(&url.parse().unwrap(), role);
        assert_eq!(checked.is_ok(), expected, "{role:?} {url}: {checked:?}");
    }

    #[test]
    fn endpoints_of_every_cloud_are_known_and_others_are_not() {
        for endpoint in [
            "https://ingest-c.westeurope.kusto.windows.net",
            "https://INGEST-C.WestEurope.Kusto.Windows.Net:443",
            "https://ingest-c.kusto.windows.net.",
            "https://ingest-trd-1.z0.kusto.fabric.microsoft.com",
            "https://ingest-c.region.kusto.usgovcloudapi.net",
            "https://ingest-c.kusto.chinacloudapi.cn",
            "https://adx.monitor.azure.com",
            "http://127.0.0.1:8080",
            "http://localhost",
            "https://[::1]:1",
        ] {
            assert!(of(endpoint, &[]).is_ok(), "{endpoint}");
        }
        for endpoint in [
            "https://evil.example",
            "https://kusto.windows.net.evil.example",
            "https://evilkusto.windows.net",
            "https://kusto.windows.net",
            "https://adx.monitor.azure.com.evil.example",
            "https://x.adx.monitor.azure.com",
            "http://ingest-c.westeurope.kusto.windows.net",
            "http://127.0.0.2",
            "http://localhost.evil.example",
            "http://10.0.0.1",
            "ftp://ingest-c.westeurope.kusto.windows.net",
        ] {
            assert!(of(endpoint, &[]).is_err(), "{endpoint}");
        }
    }

    #[test]
    fn what_an_endpoint_names_must_be_of_its_cloud() {
        let public = of("https://ingest-c.westeurope.kusto.windows.net", &[]).unwrap();
        for (role, url, expected) in [
            (Role::Login, "https://login.microsoftonline.com", true),
            (Role::Login, "https://login.microsoftonline.us", false),
            (
                Role::Login,
                "https://login.microsoftonline.com.evil.example",
                false,
            ),
            (Role::Login, "http://login.microsoftonline.com", false),
            (Role::Login, "http://127.0.0.1:1", false),
            (Role::Login, "https://127.0.0.1:1", false),
            (Role::Audience, "https://kusto.kusto.windows.net", true),
            (Role::Audience, "https://management.azure.com", false),
            (
                Role::Storage,
                "https://k1st00.blob.core.windows.net/c?sig=x",
                true,
            ),
            (
                Role::Storage,
                "https://a.z37.blob.storage.azure.net/c?sig=x",
                true,
            ),
            (
                Role::Storage,
                "https://a.blob.core.windows.net.evil.example/c",
                false,
            ),
            (
                Role::Storage,
                "https://a.blob.core.usgovcloudapi.net/c",
                false,
            ),
            (Role::Storage, "http://a.blob.core.windows.net/c", false),
        ] {
            assert_trust(&public, role, url, expected);
        }
    }

    #[test]
    fn extra_hosts_are_whole_names_or_suffixes() {
        let trusted = of(
            "https://kusto.corp.example",
            &["KUSTO.corp.example", ".st.corp.example"],
        )
        .unwrap();
        for (role, url, expected) in [
            (Role::Storage, "https://a.st.corp.example/c", true),
            (Role::Storage, "https://ast.corp.example/c", false),
            (Role::Storage, "https://a.blob.core.windows.net/c", true),
            (Role::Storage, "https://x.kusto.corp.example/c", false),
            (Role::Login, "https://login.microsoftonline.us", true),
            (Role::Login, "https://evil.example", false),
            (Role::Kusto, "https://c.kusto.windows.net", false),
        ] {
            assert_trust(&trusted, role, url, expected);
        }
        // A name of one's own is no reason to go without TLS.
        assert!(of("http://kusto.corp.example", &["kusto.corp.example"]).is_err());
    }

    #[test]
    fn a_stand_in_on_loopback_may_name_loopback() {
        let local = of("http://127.0.0.1:1", &[]).unwrap();
        assert_trust(&local, Role::Login, "http://127.0.0.1:2", true);
        assert_trust(&local, Role::Storage, "http://localhost:3/account/c", true);
        assert_trust(&local, Role::Storage, "http://10.0.0.1/c", false);
        let error = local.check(&"https://evil.example".parse().unwrap(), Role::Login);
        assert!(error.unwrap_err().to_string().contains("trusted_hosts"));
    }
}
